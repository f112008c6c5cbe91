"""Request bodies of the store server: Longbow's JSON, with type and value checks.

Unknown fields are ignored, because Longbow's clients send fields that this server does not use.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_type_hints

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from msgspec import Meta

from fletcher.core.command import DATASET_PATTERN
from fletcher.core.encodings import is_text
from fletcher.errors import InvalidCommandError
from fletcher.stores.base import Combination, Comparison, Filter, Negation, Operator
from fletcher.stores.exact_search import MAX_K
from fletcher.stores.staging import check_stored

DEFAULT_K = 10
MAX_FILTERS = 1000
MAX_FILTER_DEPTH = 16
OPERATORS: dict[str, Operator] = {
    **{name: name for name in get_args(Operator)},
    "==": "=",
    "eq": "=",
    "neq": "!=",
    "gt": ">",
    "lt": "<",
    "ge": ">=",
    "le": "<=",
}
NOT = "not"

_Request = TypeVar("_Request")
_Kinds = dict[str, pa.DataType]  # types of columns


def decode_request(kind: type[_Request], body: bytes, what: str) -> _Request:
    """The request in a JSON body. An empty body counts as an empty object.

    `what` names the body in error messages.

    Raises:
        InvalidCommandError: The body is not a JSON object, a field is missing, or a field has a
            wrong type or value.
    """
    try:
        fields = msgspec.json.decode(body or b"{}")
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        shown = body[:100].decode(errors="replace")
        raise InvalidCommandError(f"{what} is {shown!r}, expected a JSON object")
    return convert_request(kind, fields, what)


def convert_request(kind: type[_Request], fields: dict[str, Any], what: str) -> _Request:
    """The request in a decoded JSON object. Raises as `decode_request`."""
    try:
        return msgspec.convert(fields, kind)
    except RecursionError:
        raise InvalidCommandError(f"{what} is nested too deeply") from None
    except msgspec.ValidationError as error:
        # "Expected `int` >= 1 - at `$.search.k`", or "Object missing required field `id`"
        reason, _, path = str(error).rpartition(" - at `$.")
        if "Object missing" in (reason or path):
            field = (reason or path).split("`")[1]
            raise InvalidCommandError(f"`{field}` is missing in {what}", field=field) from None
        path = path.rstrip("`")
        keys = re.findall(r"\w+", path)
        value: Any = fields
        for key in keys:
            value = value[int(key) if isinstance(value, list) else key]
        shown = json.dumps(value, default=repr, ensure_ascii=False)[:100]
        field = next(key for key in reversed(keys) if not key.isdecimal())
        place = what if path == field else f"{what}, at {path}"
        hint = get_type_hints(kind).get(field)
        choices = [one for part in (hint, *get_args(hint)) for one in get_args(part)]
        allowed = [one for one in dict.fromkeys(choices) if isinstance(one, str)]
        reason = f"expected one of {', '.join(allowed)}" if allowed else reason
        raise InvalidCommandError(
            f"`{field}` is {shown} in {place}: {reason[0].lower()}{reason[1:]}",
            field=field,
            allowed=allowed or None,
        ) from None


class EmptyRequest(msgspec.Struct):
    """Body of an action that takes no fields."""


class DatasetRequest(msgspec.Struct):
    """Body of an action that takes only a dataset."""

    dataset: str


class ReadinessRequest(msgspec.Struct):
    """Body of `check_readiness`. Without a dataset, all datasets are checked."""

    dataset: str | None = None


class NamespaceRequest(msgspec.Struct):
    """Body of an action that takes only a namespace."""

    name: str


class DeleteNamespaceRequest(msgspec.Struct):
    """Body of `DeleteNamespace`: one of the two."""

    dataset: str | None = None
    name: str | None = None


class DeleteRequest(msgspec.Struct):
    """Body of `delete`."""

    dataset: str
    id: Annotated[str, Meta(min_length=1)] | int


class DeleteVectorRequest(msgspec.Struct):
    """Body of `delete-vector`."""

    dataset: str
    vector_id: int


class FilterRequest(msgspec.Struct):
    """A condition in Longbow's JSON. `op` is another name for `operator`.

    Fletcher adds the operators `in`, with a list as `value`, `is null`, and `not`, which negates
    `filters`. `logic` joins the condition to all conditions before it in the same list.
    """

    field: str = ""
    operator: str | None = None
    op: str | None = None
    value: Any = None
    logic: str | None = None
    filters: Filters = None


Filters = Annotated[list[FilterRequest], Meta(max_length=MAX_FILTERS)] | None


class SearchRequest(msgspec.Struct, kw_only=True):
    """Body of `VectorSearch`. If `vectors` is given, `vector` is ignored.

    Attributes:
        token_vectors: The vectors of one query, for a dataset with several vectors per row. If they
            are given, `vector` and `vectors` are ignored.
        text_query: Words to search for in the column `text`, in addition to the vector.
        alpha: Weight of the similarity to the vector in the score, from 0 (only words count) to 1
            (only the vector counts).
        score: `cosine`, which Fletcher's clients send, asks for stored ids, and for the score by
            the dataset's own similarity. Without it, the answer is that of a Longbow.
    """

    dataset: str = ""
    vector: list[float] | None = None
    vectors: list[list[float]] | None = None
    token_vectors: list[list[float]] | None = None
    k: Annotated[int, Meta(ge=1, le=MAX_K)] = DEFAULT_K
    filters: Filters = None
    text_query: str = ""
    alpha: Annotated[float, Meta(ge=0, le=1)] = 1.0
    include_vectors: bool = False
    columns: list[str] | None = None
    score: Literal["cosine"] | None = None

    @property
    def is_longbows(self) -> bool:
        """Whether a client of Longbow asks.

        Clients of earlier releases of Fletcher send `columns` alone.
        """
        return self.score is None and self.columns is None

    @property
    def query_vectors(self) -> list[npt.NDArray[np.float32]]:
        """The queries: each float32 [dims], or [num_vectors, dims] for `token_vectors`.

        Raises:
            InvalidCommandError: There are no query vectors, or their lengths differ.
        """
        rows = self.vectors if self.vectors is not None else [self.vector or []]
        try:
            matrix = np.asarray(rows if self.token_vectors is None else self.token_vectors)
            matrix = matrix.astype(np.float32)
        except ValueError:
            matrix = np.empty(0, np.float32)
        if matrix.ndim != 2 or not matrix.size:
            raise InvalidCommandError(
                "`vector` is not a list of numbers (or `vectors` or `token_vectors` a list of such "
                "lists, all of one length); give the query's embedding",
                field="vector",
            )
        return list(matrix) if self.token_vectors is None else [matrix]


class HybridSearchRequest(SearchRequest, kw_only=True):
    """Body of `HybridSearch`. By default, vector and words have the same weight."""

    alpha: Annotated[float, Meta(ge=0, le=1)] = 0.5


class SearchByIdRequest(SearchRequest, kw_only=True):
    """Body of `VectorSearchByID`: the stored row with this `id` is the query."""

    id: Annotated[str, Meta(min_length=1)] | int


class DoGetRequest(msgspec.Struct, kw_only=True):
    """Ticket of a DoGet: asks for rows of a dataset, or for a search in a dataset."""

    name: str | None = None
    dataset: str = ""
    filters: Filters = None
    columns: list[str] | None = None
    limit: Annotated[int, Meta(ge=0)] | None = None
    search: SearchRequest | None = None

    @classmethod
    def from_ticket(cls, ticket: bytes) -> DoGetRequest:
        """The request in a ticket, which is a JSON object or just a dataset's name.

        Raises:
            InvalidCommandError: The ticket is neither a valid JSON object nor a dataset's name.
        """
        text = ticket.decode(errors="replace").strip()
        if DATASET_PATTERN.fullmatch(text):
            return cls(dataset=text)
        request = decode_request(cls, ticket, "the ticket")
        request.dataset = request.name if request.name is not None else request.dataset
        if request.search is not None:
            request.search.dataset = request.search.dataset or request.dataset
            if request.search.filters is None:
                request.search.filters = request.filters
            request.dataset = request.search.dataset
        check_stored(request.dataset)
        return request


def to_filters(requests: Filters, schema: pa.Schema | None) -> tuple[Filter, ...]:
    """The filters of a request as the store takes them.

    The `logic` of a filter joins it to all filters before it. `schema` is that of the dataset, for
    the types of values: Longbow's clients also send numbers and booleans as text.

    Raises:
        InvalidCommandError: A filter has an unknown operator or logic, has no field, or is nested
            too deeply.
    """
    if not requests:
        return ()
    kinds = {} if schema is None else {field.name: field.type for field in schema}
    return (_join(requests, kinds, 0)[0],)


def _join(requests: list[FilterRequest], kinds: _Kinds, depth: int) -> tuple[Filter, int]:
    """The filter that requests make together, and the height of its tree."""
    joined, height = _to_filter(requests[0], kinds, depth)
    _logic(requests[0])
    for request in requests[1:]:
        logic = _logic(request)
        one, own_height = _to_filter(request, kinds, depth)
        if isinstance(joined, Combination) and joined.logic == logic:
            joined = Combination(joined.logic, (*joined.conditions, one))
            height = max(height, own_height + 1)
        else:
            joined = Combination(logic, (joined, one))
            height = max(height, own_height) + 1
        if height > MAX_FILTER_DEPTH:
            raise _too_deep()
    return joined, height


def _to_filter(request: FilterRequest, kinds: _Kinds, depth: int) -> tuple[Filter, int]:
    given = (request.operator or request.op or "=").lower()
    if given != NOT and given not in OPERATORS:
        raise InvalidCommandError(
            f"`operator` is {given[:100]!r}, expected one of {', '.join(OPERATORS)}",
            field="operator",
            allowed=list(OPERATORS),
        )
    parts: list[Filter] = []
    height = 0
    if request.field:
        operator = OPERATORS.get(given)
        if operator is None:
            raise InvalidCommandError(
                f"`operator` is {given} in a filter on `{request.field[:100]}`; put the condition "
                "to negate into `filters`",
                field="operator",
            )
        value = _typed(request.value, kinds.get(request.field, pa.null()))
        parts.append(Comparison(request.field, operator, value))
    if request.filters:
        if depth >= MAX_FILTER_DEPTH:
            raise _too_deep()
        nested, height = _join(request.filters, kinds, depth + 1)
        parts.append(nested)
    if not parts:
        raise InvalidCommandError("a filter has no `field`; name a column", field="filters")
    if len(parts) > 1:
        return Combination("and", tuple(parts)), height + 1
    return (Negation(parts[0]), height + 1) if given == NOT else (parts[0], height)


def _typed(value: Any, kind: pa.DataType) -> Any:
    """A filter's value for a column: "true" becomes a boolean, and 5 the text "5".

    The store itself reads numbers and times from text.
    """
    if isinstance(value, list):
        return [_typed(one, kind) for one in value]
    if pa.types.is_boolean(kind) and value in ("true", "false"):
        return value == "true"
    if is_text(kind) and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value


def _logic(request: FilterRequest) -> Literal["and", "or"]:
    logic = (request.logic or "and").lower()
    if logic not in ("and", "or"):
        raise InvalidCommandError(
            f"`logic` is {logic[:100]!r}, expected `and` or `or`",
            field="logic",
            allowed=["and", "or"],
        )
    return cast("Literal['and', 'or']", logic)


def _too_deep() -> InvalidCommandError:
    return InvalidCommandError(
        f"`filters` are nested more than {MAX_FILTER_DEPTH} deep", field="filters"
    )
