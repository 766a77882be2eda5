"""Tokens that may follow, of which several may follow the same one. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import index

ROOT = -1
"""The parent of those that may follow first: the token that the row takes anyway."""


@dataclass(frozen=True, slots=True)
class Tree:
    """A draft. Tokens that follow one another are a tree of one branch: a chain.

    ValueError or TypeError for what is no tree.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    """Which of the tokens each one follows: one that stands before it, or ROOT."""

    def __post_init__(self) -> None:
        for name in ("tokens", "parents"):
            object.__setattr__(self, name, tuple(map(index, getattr(self, name))))
        if len(self.tokens) != len(self.parents):
            raise ValueError(f"{len(self.tokens)} tokens, {len(self.parents)} parents")
        for node, parent in enumerate(self.parents):
            if not ROOT <= parent < node:
                raise ValueError(f"token {node} follows {parent}: none that stands before it")

    @classmethod
    def chain(cls, tokens: Iterable[int]) -> Tree:
        """Tokens one after the other."""
        tokens = tuple(tokens)
        return cls(tokens, tuple(range(ROOT, len(tokens) - 1)))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def is_chain(self) -> bool:
        """True: each token follows the one that stands before it."""
        return self.parents == tuple(range(ROOT, len(self.parents) - 1))

    @property
    def depths(self) -> list[int]:
        """How many tokens behind the one that the row takes anyway each of them is."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return depths

    @property
    def deepest(self) -> int:
        """Tokens of the longest branch."""
        return max(self.depths, default=0)

    def first(self, count: int) -> Tree:
        """Those of the first so many."""
        return self if count >= len(self) else Tree(self.tokens[:count], self.parents[:count])

    def trunk(self) -> Tree:
        """The first that may follow, the first that may follow that one, and so on: a chain."""
        nodes, node = list[int](), ROOT
        while node in self.parents:
            node = self.parents.index(node)
            nodes.append(node)
        return self if len(nodes) == len(self) else Tree.chain(self.tokens[i] for i in nodes)

    def child(self, node: int, token: int) -> int | None:
        """Where this token is among those that may follow ``node``; the first of equal ones."""
        for i in range(node + 1, len(self.tokens)):
            if self.parents[i] == node and self.tokens[i] == token:
                return i
        return None

    def path(self, tokens: Iterable[int]) -> list[int]:
        """Where these tokens are, one following the other, as far as they are there."""
        node, nodes = ROOT, list[int]()
        for token in tokens:
            child = self.child(node, token)
            if child is None:
                break
            nodes.append(child)
            node = child
        return nodes

    def branch(self, node: int) -> list[int]:
        """All that ``node`` follows, from the first one on, and itself."""
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def branches(self) -> Iterator[list[int]]:
        """The branch of each token that nothing follows."""
        followed = set(self.parents)
        for node in range(len(self)):
            if node not in followed:
                yield self.branch(node)


Draft = Sequence[int] | Tree
"""What a drafter proposes: tokens that may follow one after the other, or a tree of them."""
NOTHING = Tree()


def as_tree(draft: Draft) -> Tree:
    """The tree that a draft is."""
    return draft if isinstance(draft, Tree) else Tree.chain(draft)
