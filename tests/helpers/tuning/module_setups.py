"""Functions that open a streamed model in a trial's process, well and badly."""

from __future__ import annotations

import sys
from typing import Any

import torch

import layer_streamer


def one_forward(model: str, **settings: Any) -> Any:
    """A model that reads tokens, and one forward of it."""
    net: Any = layer_streamer.stream(model, **settings)
    ids = torch.tensor([[9, 17, 33, 12]], device=net.device)
    pair = {"decoder_input_ids": ids} if net.config.is_encoder_decoder else {}

    def run() -> None:
        with torch.no_grad():
            net(ids, **pair)

    return net, run


def no_pair(**settings: Any) -> Any:
    return one_forward(**settings)[0]


def no_function(**settings: Any) -> Any:
    return one_forward(**settings)[0], 3


def not_streamed(**settings: Any) -> Any:
    return torch.nn.Linear(1, 1), print


def ends_itself(**settings: Any) -> Any:
    sys.exit("not today")
