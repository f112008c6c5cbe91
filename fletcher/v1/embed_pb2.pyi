from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EmbedCommand(_message.Message):
    __slots__ = ("dataset", "upload_id", "model", "text_column", "id_column", "prompt", "dims", "layers", "dtype", "normalize", "truncate", "chunking", "columns", "include_text", "on_error", "mode", "dedupe", "durability", "priority", "store", "output", "continuous", "answer_bytes", "accept_compression")
    DATASET_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TEXT_COLUMN_FIELD_NUMBER: _ClassVar[int]
    ID_COLUMN_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    DIMS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    NORMALIZE_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_FIELD_NUMBER: _ClassVar[int]
    CHUNKING_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_TEXT_FIELD_NUMBER: _ClassVar[int]
    ON_ERROR_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    DEDUPE_FIELD_NUMBER: _ClassVar[int]
    DURABILITY_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    CONTINUOUS_FIELD_NUMBER: _ClassVar[int]
    ANSWER_BYTES_FIELD_NUMBER: _ClassVar[int]
    ACCEPT_COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    dataset: str
    upload_id: str
    model: str
    text_column: str
    id_column: str
    prompt: str
    dims: int
    layers: int
    dtype: str
    normalize: bool
    truncate: str
    chunking: str
    columns: _containers.RepeatedScalarFieldContainer[str]
    include_text: bool
    on_error: str
    mode: str
    dedupe: str
    durability: str
    priority: str
    store: str
    output: str
    continuous: bool
    answer_bytes: int
    accept_compression: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, dataset: _Optional[str] = ..., upload_id: _Optional[str] = ..., model: _Optional[str] = ..., text_column: _Optional[str] = ..., id_column: _Optional[str] = ..., prompt: _Optional[str] = ..., dims: _Optional[int] = ..., layers: _Optional[int] = ..., dtype: _Optional[str] = ..., normalize: bool = ..., truncate: _Optional[str] = ..., chunking: _Optional[str] = ..., columns: _Optional[_Iterable[str]] = ..., include_text: bool = ..., on_error: _Optional[str] = ..., mode: _Optional[str] = ..., dedupe: _Optional[str] = ..., durability: _Optional[str] = ..., priority: _Optional[str] = ..., store: _Optional[str] = ..., output: _Optional[str] = ..., continuous: bool = ..., answer_bytes: _Optional[int] = ..., accept_compression: _Optional[_Iterable[str]] = ...) -> None: ...

class ListModelsCommand(_message.Message):
    __slots__ = ("format",)
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    format: str
    def __init__(self, format: _Optional[str] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "hash", "family", "dim", "max_length", "pooling", "normalize", "num_layers", "layers", "dims", "prompts", "is_default", "state", "is_current", "calls", "memory_bytes", "output")
    class PromptsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    NORMALIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    DIMS_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    IS_DEFAULT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    IS_CURRENT_FIELD_NUMBER: _ClassVar[int]
    CALLS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    name: str
    hash: str
    family: str
    dim: int
    max_length: int
    pooling: str
    normalize: bool
    num_layers: int
    layers: _containers.RepeatedScalarFieldContainer[int]
    dims: _containers.RepeatedScalarFieldContainer[int]
    prompts: _containers.ScalarMap[str, str]
    is_default: bool
    state: str
    is_current: bool
    calls: int
    memory_bytes: int
    output: str
    def __init__(self, name: _Optional[str] = ..., hash: _Optional[str] = ..., family: _Optional[str] = ..., dim: _Optional[int] = ..., max_length: _Optional[int] = ..., pooling: _Optional[str] = ..., normalize: bool = ..., num_layers: _Optional[int] = ..., layers: _Optional[_Iterable[int]] = ..., dims: _Optional[_Iterable[int]] = ..., prompts: _Optional[_Mapping[str, str]] = ..., is_default: bool = ..., state: _Optional[str] = ..., is_current: bool = ..., calls: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., output: _Optional[str] = ...) -> None: ...

class ListModelsResult(_message.Message):
    __slots__ = ("models", "aliases")
    class AliasesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    MODELS_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    aliases: _containers.ScalarMap[str, str]
    def __init__(self, models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ..., aliases: _Optional[_Mapping[str, str]] = ...) -> None: ...
