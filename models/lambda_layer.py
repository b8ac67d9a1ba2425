"""Implements the lambda layer of LambdaNetworks (arXiv 2102.08602): long range without attention maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.choose_order import EXPORT_BATCH, choose_order, orders
from models.content import KEY_NORMS, causal_content, masked_content, normalise_keys
from models.contraction import ORDERS
from models.order import Order, Workload, refuse_vmap
from models.projection import CrossProjection, SelfProjection

PAPER_SCOPE = 23
PAPER_SCOPE_DEEP = 7  # with intra-depth u > 1


class LambdaLayer(nn.Module):
    """Turns the context of each position into a linear function, a lambda, and applies it to its queries.

        Q = BN(x W_Q),  K̄ = softmax over positions of c W_K,  V = BN(c W_V)       the context c is x by default
        λᶜ = Σ_m Σ_u k̄_mu v_muᵀ               content lambda, one per image, always global
        λᵖ_n = Σ_m Σ_u e_nmu v_muᵀ             position lambda, one per query; e_nm = table[m − n]
        y_n = concat over heads (λᶜ + λᵖ_n)ᵀ q_n^head

    x is [b, dim, height, width], or [b, dim, length] with `dims=1`. y has the same shape, in channels-last memory;
    stride 2 pools it by a 3 × 3 average to [b, dim, ⌈height/2⌉, ⌈width/2⌉]. In the channels of y the head is the slow
    axis and v = dim/h the fast one. All h queries of a position share its lambda, so with n queries and m context
    positions time is Θ(b n m k u dim/h) and space Θ(n m k u + b n k dim/h); with a scope of r they are
    Θ(b n r² k u dim/h) and Θ(r² k u + b n k dim/h) (table 2 of the paper). `order` is "auto" (models.choose_order) or
    the name of an order in models.contraction.

    Scope. An odd r is local: e is zero outside r × r, and inputs may have any size. r=None is global, for inputs up to
    `size` (a side, or height and width; a length); `resize_table` interpolates the table to another size.
    Context. With `dim_context` the layer takes a separate context, [b, dim_context, …], of any size: a query stands on
    its grid at row ⌊(y + ½)·context height/height⌋, and likewise for columns. An equal grid works as without one.
    Masks. `mask`, bool [n, m], says which positions a query sees, for all images (appendix B.2): keys are normalised
    over these positions, and a query that sees nothing gives zero. With `causal` a query sees itself and what comes
    before it, row by row.
    Variants. `content` and `position` switch a lambda off; `key_norm` is "softmax", "l2" or "none"; `embeddings_of` is
    another layer whose table this one uses too; the table remains a parameter of that layer only.

    Initialisation is the paper's: W_K, W_V ~ N(0, dim^-½), W_Q ~ N(0, (k·dim)^-½), e ~ N(0, 1), as standard
    deviations; no projection has a bias. Raises ValueError for arguments or inputs that do not fit together.

    Shape suffixes are those of models.contraction.
    """

    def __init__(
        self,
        dim: int,
        *,
        dim_context: int | None = None,
        k: int = 16,
        h: int = 4,
        u: int = 1,
        r: int | None = PAPER_SCOPE,
        size: int | tuple[int, int] | None = None,
        dims: int = 2,
        stride: int = 1,
        content: bool = True,
        position: bool = True,
        key_norm: str = "softmax",
        causal: bool = False,
        embeddings_of: LambdaLayer | None = None,
        order: str = "auto",
    ) -> None:
        super().__init__()
        check_arguments(dim, k=k, h=h, u=u, r=r, order=order, key_norm=key_norm, content=content, position=position)
        if stride not in (1, 2) or dims not in (1, 2):
            raise ValueError(f"a lambda layer has stride 1 or 2 and 1 or 2 dims, not stride={stride}, dims={dims}")
        if (r is None) != (size is not None):
            raise ValueError(
                f"a lambda layer is either local, with r, or global, with r=None and size, not r={r}, size={size}"
            )
        if causal and dim_context is not None:
            raise ValueError(
                "a causal lambda layer attends to its own input and takes no dim_context; pass a mask instead"
            )
        self.k, self.v, self.h, self.u, self.r, self.order = k, dim // h, h, u, r, order
        self.dims, self.key_norm, self.causal = dims, key_norm, causal
        self.content, self.position = content, position
        sizes = (h * k, self.v * u, k * u if content else 0, k**-0.5)
        self.project: SelfProjection | CrossProjection = (
            SelfProjection(dim, *sizes) if dim_context is None else CrossProjection(dim, dim_context, *sizes)
        )
        table_shape = (*table_sides(r, size, dims), k, u)
        # In a list, so that it is not registered: state dicts and parameter counts hold a shared table once.
        self._owner = [] if embeddings_of is None else [embeddings_of]
        if embeddings_of is not None and embeddings_of.embeddings().shape != table_shape:
            raise ValueError(
                f"embeddings_of has a table of shape {list(embeddings_of.embeddings().shape)}; this lambda layer needs "
                f"{list(table_shape)}"
            )
        self.table = nn.Parameter(torch.empty(table_shape)) if position and embeddings_of is None else None
        self.pool: nn.Module = nn.Identity()
        if stride == 2:
            self.pool = nn.AvgPool2d(3, 2, 1) if dims == 2 else nn.AvgPool2d((1, 3), (1, 2), (0, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.project.reset_parameters()
        if self.table is not None:
            nn.init.normal_(self.table)

    def embeddings(self) -> Tensor:
        """The table of relative embeddings, [rows, columns, k, u]: its own, or the one that it shares."""
        table = self._owner[0].embeddings() if self._owner else self.table
        if table is None:
            raise ValueError("this lambda layer has no position embeddings: it was built with position=False")
        if self._owner and hasattr(table, "full_tensor"):  # a DTensor
            raise ValueError(
                "this lambda layer shares the embeddings of another one, of which FSDP has left this process a part; "
                "let one fully_shard hold both layers"
            )
        return table

    @property
    def owner(self) -> LambdaLayer | None:
        """The layer whose embeddings this one uses too."""
        return self._owner[0] if self._owner else None

    @torch.no_grad()
    def resize_table(self, size: int | tuple[int, int]) -> None:
        """Interpolates the table of a global layer (bicubic) for inputs of another size."""
        if self.r is not None or self.table is None:
            raise ValueError("only a global lambda layer with its own table can resize it; a local one fits every size")
        table = self.table.flatten(2).permute(2, 0, 1).unsqueeze(0)
        resized = F.interpolate(table, table_sides(None, size, self.dims), mode="bicubic", align_corners=True)
        self.table = nn.Parameter(resized[0].permute(1, 2, 0).unflatten(2, (self.k, self.u)).contiguous())

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        if not torch.compiler.is_compiling():
            refuse_vmap()
        if self.dims == 1:
            x, context = x.unsqueeze(2), None if context is None else context.unsqueeze(2)
        if (context is None) == isinstance(self.project, CrossProjection):
            raise ValueError(
                "this lambda layer was built without dim_context and takes no context; call it without one"
                if context is not None
                else "this lambda layer was built with dim_context; pass the context as its second argument"
            )
        q, v, keys = self.project(x, context)
        q_BNHK = q.flatten(2).mT.unflatten(2, (self.h, self.k))
        v_BJV = v.flatten(2).mT.unflatten(2, (self.u, self.v)).flatten(1, 2)
        keys_BMUK = keys.flatten(2).mT.unflatten(2, (self.u, self.k)) if self.content else None
        y_BNHV = self._apply_lambdas(q_BNHK, keys_BMUK, v_BJV, q.shape[2:], v.shape[2:], mask)
        y: Tensor = self.pool(y_BNHV.flatten(2).unflatten(1, q.shape[2:]).permute(0, 3, 1, 2))
        return y.squeeze(2) if self.dims == 1 else y

    def _apply_lambdas(
        self,
        q_BNHK: Tensor,
        keys_BMUK: Tensor | None,
        v_BJV: Tensor,
        grid: torch.Size,
        context_grid: torch.Size,
        mask: Tensor | None,
    ) -> Tensor:
        height, width = context_grid
        if mask is not None:
            check_mask(mask, grid.numel(), context_grid.numel())
        order = self._order(q_BNHK, context_grid, dense=mask is not None or grid != context_grid)
        visible = mask
        if self.causal and mask is not None:
            visible = mask & torch.ones_like(mask).tril()
        y_BNHV = keys_BJK = None
        if keys_BMUK is not None and self.causal and mask is None:
            y_BNHV = causal_content(q_BNHK, keys_BMUK, v_BJV, self.key_norm)
        elif keys_BMUK is not None and visible is not None:
            y_BNHV = masked_content(q_BNHK, keys_BMUK, v_BJV, visible, self.key_norm, order.content_lambdas)
        elif keys_BMUK is not None:
            keys_BJK = normalise_keys(keys_BMUK, self.key_norm).flatten(1, 2).to(v_BJV.dtype)
        if not self.position:
            if y_BNHV is not None:
                return y_BNHV
            assert keys_BJK is not None
            return q_BNHK @ (keys_BJK.mT @ v_BJV).unsqueeze(1)
        table = self.embeddings().to(v_BJV.dtype)
        self._check_size(table, context_grid)
        if self.causal:  # the offset alone says what comes before, so every order can do this
            rows, columns, *_ = table.shape
            table = table.masked_fill(later_offsets(rows, columns, table.device)[:, :, None, None], 0)
        place = None if grid == context_grid else places(grid, context_grid, v_BJV.device)
        position = order.apply(q_BNHK, keys_BJK, v_BJV, table, height, width, mask, place)
        return position if y_BNHV is None else position + y_BNHV

    def _order(self, q_BNHK: Tensor, grid: torch.Size, dense: bool) -> Order:
        if self.order != "auto":
            if dense and not ORDERS[self.order].dense:
                raise ValueError(
                    f"order {self.order!r} of a lambda layer takes no mask and no context of another size; "
                    f"the orders that do are {', '.join(orders(dense=True))}"
                )
            return ORDERS[self.order]
        workload = Workload(
            height=grid[0],
            width=grid[1],
            # An export must hold for every batch, so it may not read this one.
            batch=EXPORT_BATCH if torch.compiler.is_compiling() else q_BNHK.shape[0],
            k=self.k,
            v=self.v,
            h=self.h,
            u=self.u,
            r=max(self.embeddings().shape[:2]) if self.position else 1,
            training=self.training,
        )
        return ORDERS[choose_order(workload, dense)]

    def _check_size(self, table_YXKU: Tensor, grid: torch.Size) -> None:
        largest = [(side + 1) // 2 for side in table_YXKU.shape[:2]]
        if self.r is None and any(side > most for side, most in zip(grid, largest, strict=True)):
            raise ValueError(
                f"a context of {grid[0]} × {grid[1]} does not fit the table of a global lambda layer for up to "
                f"{largest[0]} × {largest[1]}; call resize_table, or build it with a scope r"
            )

    def fold(self) -> None:
        """Folds the batch norm of queries and values into the projection, for inference."""
        self.project.fold()

    def extra_repr(self) -> str:
        return f"k={self.k}, v={self.v}, h={self.h}, u={self.u}, r={self.r}, order={self.order!r}"


def table_sides(r: int | None, size: int | tuple[int, int] | None, dims: int) -> tuple[int, int]:
    """Rows and columns of a table: the scope, or all offsets that occur in a map of `size`."""
    if size is not None:
        height, width = size if isinstance(size, tuple) else (size if dims == 2 else 1, size)
        if height < 1 or width < 1 or (dims == 1 and height > 1):
            raise ValueError(
                f"size of a global lambda layer is a side, (height, width) or a length, at least 1, not {size}"
            )
        return 2 * height - 1, 2 * width - 1
    assert r is not None
    return (r, r) if dims == 2 else (1, r)


def later_offsets(rows: int, columns: int, device: torch.device) -> Tensor:
    """Marks the entries of a table that belong to positions after the query, row by row; bool [rows, columns]."""
    y = torch.arange(rows, device=device)[:, None] - rows // 2
    x = torch.arange(columns, device=device) - columns // 2
    return (y > 0) | ((y == 0) & (x > 0))


def places(grid: torch.Size, context_grid: torch.Size, device: torch.device) -> Tensor:
    """The index of the context position at which every query stands, [N]."""
    y, x = (
        (2 * torch.arange(side, device=device) + 1) * context // (2 * side)
        for side, context in zip(grid, context_grid, strict=True)
    )
    return (y[:, None] * context_grid[1] + x).flatten()


def check_mask(mask: Tensor, n: int, m: int) -> None:
    if mask.shape != (n, m) or mask.dtype != torch.bool:
        dtype = str(mask.dtype).removeprefix("torch.")
        raise ValueError(
            f"the mask of a lambda layer is bool of shape [{n}, {m}] (queries, context positions), "
            f"not {dtype} of shape {list(mask.shape)}"
        )


def check_arguments(
    dim: int,
    *,
    k: int,
    h: int,
    u: int,
    r: int | None,
    order: str,
    key_norm: str = "softmax",
    content: bool = True,
    position: bool = True,
) -> None:
    """Raises a ValueError of one sentence if no lambda layer can be built with these arguments."""
    for name, value in {"dim": dim, "k": k, "h": h, "u": u, "r": r}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} of a lambda layer is at least 1, not {value}")
    if dim % h:
        divisors = ", ".join(str(n) for n in range(1, dim + 1) if dim % n == 0)
        raise ValueError(f"h={h} does not divide the width {dim} of a lambda layer; numbers that do are {divisors}")
    if r is not None and r % 2 == 0:
        raise ValueError(f"the scope r of a lambda layer is odd, because it needs a centre, not {r}")
    for name, chosen, allowed in (("order", order, ("auto", *ORDERS)), ("key_norm", key_norm, KEY_NORMS)):
        if chosen not in allowed:
            raise ValueError(f"{name} of a lambda layer is one of {', '.join(allowed)}, not {chosen!r}")
    if not content and not position:
        raise ValueError(
            "a lambda layer has content lambdas, position lambdas or both, but content and position are both false"
        )
