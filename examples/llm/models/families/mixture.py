"""What the layers of a mixture of experts are, and what configs and checkpoints call them."""

from __future__ import annotations

from dataclasses import dataclass

from ..modules import MATRICES, ROUTER, expert_of

STACKED = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
"""The tensor of a layer that has all experts' matrices of a kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """One type of mixtures; defaults are Qwen's. Layers have a router, which chooses experts for
    each token, and experts, each of which is a feed-forward block of three matrices."""

    experts: str = "num_experts"
    """The config's field with how many a layer has."""
    width: str = "moe_intermediate_size"
    """The field with the width between the matrices of one."""
    shared_width: str | None = None
    """The same of a block that every token passes, too; None: there is none."""
    normed: str | None = "norm_topk_prob"
    """The field that says whether what a token's experts count is divided by its sum; None: it
    always is."""
    rounded: bool = True
    """What they count is rounded to the layer's dtype; else it stays in float32."""
    of_chosen: bool = False
    """What they count is a softmax over the chosen ones; else over all."""
    clamped: bool = False
    """Gates and what they multiply are clamped, as ``swiglu_limit`` and ``swiglu_alpha`` say, and
    all three matrices of an expert have a bias."""
    stacked: bool = False
    """On the hub those of all experts are one tensor, rows of gate and up taking turns."""
    dense_layers: bool = False
    """Some layers may have one block and no router, as ``mlp_only_layers`` and
    ``decoder_sparse_step`` say."""

    block: str = "mlp"
    """The module with the router and the experts, on the hub."""
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """The matrices of an expert, on the hub."""
    normed_in_gguf: bool = True
    """What ``normed`` is in the models of which there are GGUF files, which do not say."""

    def hub_name(self, module: str) -> str:
        """What the engine calls as Qwen does, by its name on the hub."""
        if module == ROUTER:
            return f"{self.block}.{'router' if self.stacked else 'gate'}"
        found = expert_of(module)
        if found is None:
            return module
        expert, matrix = found
        if self.stacked:
            return f"{self.block}.experts.{STACKED[matrix]}"
        return f"{self.block}.experts.{expert}.{self.matrices[MATRICES.index(matrix)]}"
