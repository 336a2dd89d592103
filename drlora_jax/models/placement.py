"""What an adapter may add to a decoder: the interface that `models` is written against.

A decoder is handed one `Placement` value. It asks it at four points, each inside of the module that
the adapted weights belong to, and knows nothing else of adapters:

    delta            what is added to the product x W of a projection
    ffn              a module that takes the place of a dense FFN
    expert_matrices  LoRA matrices for the fused operation over a layer's experts
    router_delta     what is added to the weights of a router

The class itself adds nothing anywhere, so an instance of it (`NO_ADAPTER`) is the base model.
`adapters/` has a file with a subclass for each value of `adapter.kind`, and the documentation says
how to add one. Values are static and hashable: they are part of what a step is compiled for.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Self

import flax.linen as nn
import jax

from drlora_jax.models.architecture import (
    ATTENTION_ROLES,
    DenseFfnConfig,
    Matrix,
    ModelConfig,
    RoutingConfig,
)
from drlora_jax.models.routing import RoutingStats
from drlora_jax.ops.experts.shared import ROLES, RoleLora


class PlacementOptions:
    """A placement as the config knows it: base of frozen dataclasses of a placement's own fields.

    `section` is the config section `adapter`, of which `targets`, `scale`, `dropout` and `rank` are
    shared by all placements.
    """

    text: ClassVar[str]  # one line for the reference

    def check(self, section: Any) -> None:
        """Raises UserError for values that cannot be."""


class Strength(NamedTuple):
    """How much of a low-rank product enters."""

    scale: float  # alpha / rank
    dropout: float  # rate on the input, in training


class ExpertMatrices(NamedTuple):
    """The LoRA matrices of a layer's experts, as the fused operation takes them."""

    roles: dict[str, RoleLora]  # gate, up (or gate_up) and down; empty: none is adapted
    strength: Strength


class Coverage(NamedTuple):
    """One line of the table of weights: what happens to a kind of matrix."""

    path: str
    matrices: int
    parameters: int
    trained: int
    status: str


@dataclass(frozen=True)
class Placement:
    """An adapter's place in a model.

    Attributes:
      paths: module paths with LoRA matrices, such as segment_0/layer_0/attention/q. A module of the
        decoder is handed the value with the paths below it.
      max_rank: allocated ranks of every expert.
    """

    paths: frozenset[str] = frozenset()
    max_rank: int = 0

    kind: ClassVar[str] = "none"  # the value of adapter.kind
    options: ClassVar[type[PlacementOptions]] = PlacementOptions  # its own config fields
    # Modules of a layer (attention, mlp, moe) whose LoRA matrices have a leading axis of experts.
    expert_modules: ClassVar[tuple[str, ...]] = ()
    # Whether the experts are the adapter's own: then one without an active rank is never chosen.
    makes_experts: ClassVar[bool] = False
    # Whether experts share LoRA matrices: then the ranks of one cannot be put in another order.
    shares_matrices: ClassVar[bool] = False

    # --------------------------------------------------------------------------- from a config

    @classmethod
    def accepts(cls, matrix: Matrix) -> bool:
        """Whether a role in `adapter.targets` may mean this matrix."""
        return False

    @classmethod
    def check_model(cls, config: ModelConfig) -> None:
        """Raises UserError for a model that cannot have this adapter."""

    @classmethod
    def check_paths(cls, config: ModelConfig, paths: frozenset[str]) -> None:
        """Raises UserError for targets that each match something, but do not go together."""

    @classmethod
    def from_section(
        cls, config: ModelConfig, section: Any, paths: frozenset[str], *, rank: int, max_rank: int
    ) -> Self:
        """Returns the value that a config section `adapter` describes for a model.

        Args:
          rank: of matrices without experts. max_rank: allocated for every expert.
        """
        return cls(paths=paths, max_rank=max_rank)

    # ------------------------------------------------------------------------- inside the decoder

    def below(self, name: str) -> Self:
        """The same for the module `name` of the module that this value was handed to."""
        prefix = f"{name}/"
        inside = (path.removeprefix(prefix) for path in self.paths if path.startswith(prefix))
        return replace(self, paths=frozenset(inside))

    def delta(
        self,
        module: nn.Module,
        x_BTD: jax.Array,
        product_BTF: jax.Array,
        kernel_DF: jax.Array,
        segment_ids_BT: jax.Array,
    ) -> tuple[jax.Array, list[RoutingStats]]:
        """Returns what is added to the product x W of an adapted projection, in its shape and
        dtype, and the statistics of the routers that took part.

        Args:
          module: the projection, whose name is in `paths`; it owns what is made here.
        """
        raise NotImplementedError(f"adapter.kind={self.kind} adapts no projection")

    def ffn(self, config: DenseFfnConfig, options: Any) -> nn.Module | None:
        """Returns the module that takes the place of a dense FFN; None: there is none.

        It is called as `DenseFfn` is. `options` are the `DecoderOptions` of the module.
        """
        return None

    def expert_matrices(
        self, module: nn.Module, num_experts: int, shapes: dict[str, tuple[int, int]]
    ) -> ExpertMatrices:
        """Returns the LoRA matrices of a layer's experts.

        Args:
          module: the mixture of experts; it owns what is made here.
          shapes: (in_features, out_features) of gate, up, gate_up and down.
        """
        return ExpertMatrices({}, Strength(1.0, 0.0))

    def router_delta(self, module: nn.Module, shape: tuple[int, int]) -> jax.Array | None:
        """Returns what is added to a router's weights [D, E], f32; None: it is frozen."""
        return None

    # ------------------------------------------------------------------- the axes of ranks [L, E]

    def expert_layers(self, config: ModelConfig) -> tuple[int, ...]:
        """Returns the model layer index of every layer with experts, the base model's or the
        adapter's own: the L axis of masks and statistics.
        """
        return config.moe_layers

    def routing(self, config: ModelConfig) -> RoutingConfig | None:
        """Returns the routing that all those layers share; None where there are none."""
        return config.moe.routing if config.moe else None

    def is_expert(self, path: str) -> bool:
        """Whether the LoRA matrices at this path have a leading axis of experts."""
        return path.split("/")[-2] in self.expert_modules

    def expert_roles(self) -> tuple[str, ...]:
        """Returns the roles with LoRA matrices on experts, in the order of the P axis."""
        found = {path.rpartition("/")[2] for path in self.paths if self.is_expert(path)}
        return tuple(role for role in (*ATTENTION_ROLES, *ROLES) if role in found)

    def expert_place(self, role: str) -> tuple[str, str]:
        """Returns the modules below a layer that hold a role's LoRA matrices of experts, such as
        (moe, up_lora).
        """
        is_attention = role in ATTENTION_ROLES
        module = next(each for each in self.expert_modules if (each == "attention") == is_attention)
        return module, f"{role}_lora"

    def gated_side(self, role: str) -> str:
        """Returns which of the LoRA matrices a and b of an expert starts at zero, so that a rank
        that becomes active changes nothing. It is the one that every expert has for itself.
        """
        return "b"

    # --------------------------------------------------------------------- counting and exporting

    def cover(self, config: ModelConfig, matrix: Matrix, frozen: Coverage) -> list[Coverage]:
        """Returns the lines of the table of weights for one matrix, and for weights that the
        adapter adds beside it; `frozen` is the line of a matrix that is left alone.
        """
        return [frozen]

    def plain_inputs(self, matrix: Matrix) -> int:
        """Returns how many numbers per token a matrix's LoRA reads outside of expert operations."""
        is_plain = matrix.path in self.paths and not self.is_expert(matrix.path)
        return matrix.in_features if is_plain else 0

    @property
    def ffn_passes(self) -> int:
        """How many hidden vectors of a dense FFN a token has."""
        return 1

    @property
    def side_ranks(self) -> int:
        """Numbers per token that the LoRA experts of one adapted projection have as ranks."""
        return 0

    def notes(self, config: ModelConfig) -> list[str]:
        """Returns lines to print below the table of weights."""
        return []

    @property
    def trains_routers(self) -> bool:
        """Whether routers are trained, the base model's or the adapter's own."""
        return self.makes_experts

    @classmethod
    def why_no_export(cls, run_dir: str) -> str | None:
        """Returns why neither peft nor transformers has a form for this adapter, and what to do
        instead; None: it is exported as pairs of matrices.
        """
        return None


NO_ADAPTER = Placement()
