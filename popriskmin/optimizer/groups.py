"""Parameter groups from name patterns, and the names of the parameters in any groups."""

from __future__ import annotations

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

# A parameter group of an optimizer: "params", and options by their names.
Group = Mapping[str, Any]
AnyGroup = dict[str, Any]  # one that is written to
# What torch's optimizers are built of.
Parameters = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[AnyGroup]

_NORMS: tuple[type[nn.Module], ...] = tuple(
    kind
    for kind in (
        nn.modules.batchnorm._NormBase,  # batch and instance norms
        nn.LayerNorm,
        nn.GroupNorm,
        getattr(nn, "RMSNorm", None),  # since torch 2.4
    )
    if kind is not None
)
# What other libraries call theirs: LlamaRMSNorm, T5LayerNorm, FrozenBatchNorm2d.
_NORM_CLASS = re.compile(r"Norm(\dd)?$")
_BIAS = re.compile(r"bias|bias_.*|.*_bias")
# Classes such as VocabParallelEmbedding, and parameters such as pos_embed.
_EMBEDDING_CLASS = re.compile(r"Embedding(Bag)?$")
_EMBEDDING = re.compile(r"(.*_)?embed(ding)?s?")


def param_groups(
    model: nn.Module,
    patterns: Mapping[str, Group] | None = None,
    *,
    weight_decay: float = 0.01,
    named: bool = True,
    shrinkage: float | None = None,
) -> list[AnyGroup]:
    """Sort a model's parameters into groups for an optimizer, by patterns of their names.

    Biases and the parameters of normalization layers get no weight decay, whatever the patterns say. A bias is known
    by its name (`bias`, `bias_…`, `…_bias`), a normalization layer by its type: torch's own, and classes whose name
    ends in Norm, Norm1d, Norm2d or Norm3d. Embeddings decay, unless a pattern gives them `weight_decay=0.0`.

    The same parameters get no `shrinkage`. Embeddings get it only from a pattern. An
    embedding is known by its type: torch's own, and classes whose name ends in Embedding or
    EmbeddingBag. Or by its name: `embed`, `…_embed`, `…_embedding`, `…_embeddings`.

    Parameters
    ----------
    model
        Its parameters are taken once each, tied ones too: under the first of their names, while a pattern may match
        any of them. Frozen ones are kept, as torch's optimizers do: they do not move, and do once they are unfrozen.
    patterns
        From a pattern to options of the group. A pattern is a shell pattern for the whole name: `*` stands for any
        characters, dots too, `?` for one, `[0-3]` for one of these; case matters. The first that matches counts.
        `weight_decay` and `shrinkage` among the options are for what decays.
    weight_decay
        For what no pattern gives another one.
    named
        Hand over the names with the parameters, which `get_mask_stats(by="parameter")` and `diagnose` show. False for
        `torch.optim` before torch 2.6, which takes none.
    shrinkage
        For what no pattern gives another one, see `PRM`. None leaves it to the optimizer,
        which shrinks embeddings too.

    Returns
    -------
    list of dict
        For each pattern in turn, and then for the rest, up to two groups: what decays, and what does not. Between
        them, where `shrinkage` is given, comes a third: embeddings. Each has "params", "weight_decay", "pattern" (None
        for the rest), the pattern's options, and "shrinkage" where that or the pattern's options have it.

    Raises
    ------
    TypeError
        If `model` is no module, or `patterns` no mapping from text to mappings.
    ValueError
        For a pattern that matches no name, or only names that an earlier one has taken; for "params" among the
        options; for a model without parameters.

    Examples
    --------
    >>> from popriskmin import PRM
    >>> model = nn.ModuleDict({"body": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "router": nn.Linear(4, 2)})
    >>> groups = param_groups(model, {"router.*": {"mask": "none"}}, weight_decay=0.1)
    >>> for group in groups:
    ...     print([name for name, _ in group["params"]], group["weight_decay"], group.get("mask"))
    ['router.weight'] 0.1 none
    ['router.bias'] 0.0 none
    ['body.weight'] 0.1 None
    ['body.bias', 'norm.weight', 'norm.bias'] 0.0 None
    >>> optimizer = PRM(groups, lr=1e-3)

    Shrinkage of the first layer alone:

    >>> groups = param_groups(model, {"body.*": {"shrinkage": 2.0}})
    >>> for group in groups:
    ...     print([name for name, _ in group["params"]], group.get("shrinkage"))
    ['body.weight'] 2.0
    ['body.bias'] 0.0
    ['router.weight'] None
    ['norm.weight', 'norm.bias', 'router.bias'] None
    >>> optimizer = PRM(groups, lr=1e-3, batch_size=32, n_dataset=1000)
    """
    patterns = _checked(model, patterns)
    parameters = _parameters(model)
    chosen = [next((p for p in patterns if _matches(one.names, p)), None) for one in parameters]
    for pattern in patterns:
        if pattern not in chosen:
            raise ValueError(_unmatched(pattern, list(patterns), [one.names for one in parameters]))
    defaults: dict[str, object] = {"weight_decay": weight_decay}
    if shrinkage is not None:
        defaults["shrinkage"] = shrinkage
    groups = []
    for candidate in (*patterns, None):
        own: Group = {} if candidate is None else patterns[candidate]
        options = {**defaults, **own}
        off: dict[str, object] = {name: 0.0 for name in ("weight_decay", "shrinkage") if name in options}
        spares_embeddings = shrinkage is not None and "shrinkage" not in own
        kinds = {"weight": options, "embedding": options, "bias or norm": {**options, **off}}
        if spares_embeddings:
            kinds["embedding"] = {**options, "shrinkage": 0.0}
        members: dict[str, list[object]] = {kind: [] for kind in kinds}
        for one, its_pattern in zip(parameters, chosen):
            if its_pattern == candidate:
                like = "weight" if one.kind == "embedding" and not spares_embeddings else one.kind
                members[like].append((one.names[0], one.param) if named else one.param)
        groups += [{"params": members[kind], **kinds[kind], "pattern": candidate} for kind in kinds if members[kind]]
    return groups


class Names(list[str]):
    """The "param_names" of a group, which know whose they are: users edit the list of parameters beside them.

    Parameters are known by their `id`. No reference to them is kept: `torch.utils.swap_tensors` refuses weak ones too,
    so what has left the group is forgotten when the names are next asked for.
    """

    def __init__(self, names: Sequence[str], params: Sequence[Tensor]) -> None:
        super().__init__(names)
        self._pair(params)

    def _pair(self, params: Sequence[Tensor]) -> None:
        self._paired = tuple(self)
        self._owners = {id(param): name for param, name in zip(params, self)}

    def __reduce__(self) -> tuple[type[list[str]], tuple[list[str]]]:
        """Return a copy's or a pickle's content: plain names, since the parameters there are others."""
        return list, (list(self),)

    def of(self, params: Sequence[Tensor]) -> list[str | None]:
        """Return the name of each parameter; None for one that came without."""
        if tuple(self) != self._paired and len(self) == len(params):
            self._pair(params)  # both lists were edited
        found = {id(param): self._owners.get(id(param)) for param in params}
        self._owners = {owner: name for owner, name in found.items() if name is not None}
        return [found[id(param)] for param in params]


def pair_names(group: dict[str, Any]) -> None:
    """Let the names of a group's parameters, if it has any, belong to these parameters from now on."""
    names = group.get("param_names") or ()
    if len(names) == len(group["params"]) > 0 and not isinstance(names, Names):
        group["param_names"] = Names(names, group["params"])


def _own_names(group: Group) -> Sequence[str | None]:
    params, names = group["params"], group.get("param_names") or ()
    if isinstance(names, Names):
        return names.of(params)
    # Of another optimizer's lists of different length nobody can tell what belongs together.
    return names if len(names) == len(params) else [None] * len(params)


def with_plain_names(written: Sequence[Group], groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return groups, as they are about to be written, with a plain name for each parameter of the optimizer's `groups`.

    A group without names stays without; where a parameter alone has none, its place stands for it.
    """
    return [
        {**to_write, "param_names": [str(p) if name is None else name for name, p in zip(_own_names(group), places)]}
        if isinstance(group.get("param_names"), Names)
        else dict(to_write)
        for to_write, group, places in zip(written, groups, parameter_places(groups))
    ]


def parameter_places(groups: Sequence[Group]) -> list[range]:
    """Return the places of each group's parameters in the list of all."""
    ends = list(itertools.accumulate(len(group["params"]) for group in groups))
    return [range(end - len(group["params"]), end) for group, end in zip(groups, ends)]


def parameter_names(groups: Sequence[Group]) -> list[list[str | int]]:
    """Return a key for every parameter of each group: its name, or where it has none its place in the whole list.

    A name that several groups share, as when two models are trained together, gets its group's number.
    """
    names: list[list[str | int]] = [
        [place if name is None else name for name, place in zip(_own_names(group), places)]
        for group, places in zip(groups, parameter_places(groups))
    ]
    uses = Counter(name for group_names in names for name in group_names)
    return [
        [f"group {i}: {name}" if uses[name] > 1 else name for name in group_names]
        for i, group_names in enumerate(names)
    ]


def _checked(model: object, patterns: object) -> Mapping[str, Group]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if next(model.parameters(), None) is None:
        raise ValueError(f"model has no parameters: {type(model).__name__}")
    patterns = {} if patterns is None else patterns
    shape = 'patterns must be a dict such as {"router.*": {"mask": "none"}}'
    if not isinstance(patterns, Mapping):
        raise TypeError(f"{shape}, got {type(patterns).__name__}")
    for pattern, options in patterns.items():
        if not isinstance(pattern, str) or not isinstance(options, Mapping):
            raise TypeError(f"{shape}, got {pattern!r}: {options!r}")
        for key in ("params", "pattern"):
            if key in options:
                raise ValueError(f"the options of {pattern!r} must not hold {key!r}, which param_groups fills in")
    return patterns


class _Parameter(NamedTuple):
    """A parameter, all its names, and what it is: "weight", "embedding" or "bias or norm"."""

    param: nn.Parameter
    names: list[str]
    kind: str


def _parameters(model: nn.Module) -> list[_Parameter]:
    """Return each parameter once. One that is several things, being tied, is the first of these: norm, embedding."""
    occurrences: dict[nn.Parameter, tuple[list[str], set[str]]] = {}
    for name, param, kind in _occurrences(model):
        names, kinds = occurrences.setdefault(param, ([], set()))
        names.append(name)
        kinds.add(kind)
    order = ("bias or norm", "embedding", "weight")
    return [
        _Parameter(param, names, next(kind for kind in order if kind in kinds))
        for param, (names, kinds) in occurrences.items()
    ]


def _occurrences(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, str]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        norm = isinstance(module, _NORMS) or _NORM_CLASS.search(type(module).__name__) is not None
        embedding = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        embedding = embedding or _EMBEDDING_CLASS.search(type(module).__name__) is not None
        for name, param in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
            # A parametrized bias stands under parametrizations.bias.original, or original0 and so on.
            *_, last = re.sub(r"(^|\.)parametrizations\.(\w+)\.original\d*$", r"\1\2", name).split(".")
            if norm or _BIAS.fullmatch(last):
                yield name, param, "bias or norm"
            else:
                yield name, param, "embedding" if embedding or _EMBEDDING.fullmatch(last) else "weight"


def _matches(names: list[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _unmatched(pattern: str, patterns: list[str], all_names: list[list[str]]) -> str:
    for names in all_names:
        if _matches(names, pattern):
            earlier = next(p for p in patterns if _matches(names, p))
            return f"everything that {pattern!r} matches is taken by an earlier pattern, as {names[0]} by {earlier!r}"
    names = [name for group in all_names for name in group]
    modules = {name.rpartition(".")[0] + ".*" for name in names if "." in name}
    parents = {".".join(m.split(".")[:depth]) + ".*" for m in modules for depth in range(1, m.count(".") + 1)}
    near = difflib.get_close_matches(pattern, [*names, *sorted(modules | parents)], n=3, cutoff=0.5)
    hint = f"near it are {', '.join(near)}" if near else f"the first are {', '.join(names[:3])}"
    return f"the pattern {pattern!r} matches no parameter name; {hint}"
