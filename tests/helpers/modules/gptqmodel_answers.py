"""The answer of transformers' own GPTQ and AWQ layers, by the package gptqmodel.

    python gptqmodel_answers.py FOLDER OUTPUT

A program of its own: the package changes the environment, and prints.
"""

from __future__ import annotations

import sys

import torch
import transformers

IDS = [[9, 17, 33, 12]]


def main(folder: str, output: str) -> None:
    """Save the logits of IDS, and the name of the class of a packed layer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map="cpu"
    )
    with torch.no_grad():
        logits = model(torch.tensor(IDS)).logits
    kind = type(model.model.layers[0].mlp.down_proj).__name__
    torch.save({"logits": logits, "kind": kind}, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
