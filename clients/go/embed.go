package longbowfletcher

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/flight"
	"github.com/apache/arrow-go/v18/arrow/float16"
	"github.com/apache/arrow-go/v18/arrow/ipc"
	"github.com/apache/arrow-go/v18/arrow/memory"
)

// Rows of one message of an exchange. A message should have 1 to 4 MiB.
const (
	messageRows  = 1024
	messageBytes = 2 << 20
)

// Model that a server runs.
type Model struct {
	Name      string            `json:"name"`
	Hash      string            `json:"hash"`
	Dim       int               `json:"dim"`
	MaxLength int               `json:"max_length"`
	IsDefault bool              `json:"is_default"`
	Prompts   map[string]string `json:"prompts"`
}

// EmbedOption changes how texts are embedded.
type EmbedOption func(map[string]any)

// WithModel chooses one of the server's models: NAME or NAME@HASH.
func WithModel(name string) EmbedOption { return func(c map[string]any) { c["model"] = name } }

// WithPrompt puts a text before each text. A single word is the name of one of the model's prompts.
func WithPrompt(prompt string) EmbedOption { return func(c map[string]any) { c["prompt"] = prompt } }

// WithDims keeps the first dimensions only, for models that allow it.
func WithDims(dims int) EmbedOption { return func(c map[string]any) { c["dims"] = dims } }

// WithField sets another field of the command (docs/wire.md).
func WithField(name string, value any) EmbedOption {
	return func(c map[string]any) { c[name] = value }
}

// Models lists the server's models.
func (c *Client) Models(ctx context.Context) ([]Model, error) {
	var answer struct {
		Models []Model `json:"models"`
	}
	if err := c.Action(ctx, "list_models", nil, &answer); err != nil {
		return nil, err
	}
	return answer.Models, nil
}

// EmbedQueries embeds queries with the model's prompt for queries, if it has one.
func (c *Client) EmbedQueries(ctx context.Context, texts []string, options ...EmbedOption) ([][]float32, error) {
	return c.embedWith(ctx, []string{"query", "search_query"}, texts, options)
}

// EmbedDocuments embeds documents with the model's prompt for documents, if it has one.
func (c *Client) EmbedDocuments(ctx context.Context, texts []string, options ...EmbedOption) ([][]float32, error) {
	return c.embedWith(ctx, []string{"document", "passage", "corpus", "search_document"}, texts, options)
}

func (c *Client) embedWith(ctx context.Context, names, texts []string, options []EmbedOption) ([][]float32, error) {
	models, err := c.Models(ctx)
	if err != nil {
		return nil, err
	}
	command := map[string]any{}
	for _, option := range options {
		option(command)
	}
	wanted, _ := command["model"].(string)
	for _, model := range models {
		isWanted := model.Name == wanted || model.Name+"@"+model.Hash == wanted
		if (wanted == "" && !model.IsDefault) || (wanted != "" && !isWanted) {
			continue
		}
		for _, name := range names {
			if _, has := model.Prompts[name]; has {
				return c.Embed(ctx, texts, append([]EmbedOption{WithPrompt(name)}, options...)...)
			}
		}
	}
	return c.Embed(ctx, texts, options...)
}

// Embed embeds texts, and returns a vector for each. Vectors are float32, whatever type the server
// sends. The error of the first text without a vector is returned as RowError.
func (c *Client) Embed(ctx context.Context, texts []string, options ...EmbedOption) ([][]float32, error) {
	command := map[string]any{"accept_compression": []string{"lz4", "zstd"}, "dtype": "float32"}
	for _, option := range options {
		option(command)
	}
	for failures := 1; ; failures++ {
		vectors, err := c.exchange(ctx, command, texts)
		if err == nil {
			return vectors, nil
		}
		var row RowError
		if errors.As(err, &row) {
			return nil, row
		}
		if err := c.retry.wait(ctx, failures, fromStatus(err, nil)); err != nil {
			return nil, err
		}
	}
}

// exchange embeds texts by one DoExchange.
func (c *Client) exchange(ctx context.Context, command map[string]any, texts []string) ([][]float32, error) {
	describe, err := descriptor(command)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(c.outgoing(ctx))
	defer cancel()
	stream, err := c.flight.DoExchange(ctx)
	if err != nil {
		return nil, fromStatus(err, nil)
	}
	written := make(chan error, 1)
	go func() { written <- writeTexts(stream, describe, texts) }()
	vectors, err := readVectors(stream, len(texts))
	cancel()
	<-written // if writing failed, reading told why
	return vectors, err
}

// textWriter is what DoExchange and DoPut write to.
type textWriter interface {
	Send(*flight.FlightData) error
	CloseSend() error
}

func writeTexts(stream textWriter, describe *flight.FlightDescriptor, texts []string) error {
	schema := arrow.NewSchema([]arrow.Field{{Name: "text", Type: arrow.BinaryTypes.String}}, nil)
	writer := flight.NewRecordWriter(stream, ipc.WithSchema(schema))
	writer.SetFlightDescriptor(describe)
	for part := range cutTexts(texts) {
		builder := array.NewStringBuilder(memory.DefaultAllocator)
		builder.AppendValues(part, nil)
		column := builder.NewArray()
		batch := array.NewRecordBatch(schema, []arrow.Array{column}, int64(len(part)))
		err := writer.Write(batch)
		batch.Release()
		column.Release()
		builder.Release()
		if err != nil {
			return err
		}
	}
	if err := writer.Close(); err != nil {
		return err
	}
	return stream.CloseSend()
}

// cutTexts cuts texts into parts of a message each. There is at least one part, so that the schema
// is sent.
func cutTexts(texts []string) func(func([]string) bool) {
	return func(yield func([]string) bool) {
		first, size := 0, 0
		for place, text := range texts {
			if place > first && (size+len(text) > messageBytes || place-first == messageRows) {
				if !yield(texts[first:place]) {
					return
				}
				first, size = place, 0
			}
			size += len(text) + 4
		}
		yield(texts[first:])
	}
}

func readVectors(stream flight.FlightService_DoExchangeClient, numTexts int) (vectors [][]float32, err error) {
	reader, err := flight.NewRecordReader(stream)
	if err != nil {
		return nil, fromStatus(err, stream.Trailer())
	}
	defer reader.Release()
	var answer struct {
		Errors []RowError `json:"errors"`
	}
	for reader.Next() {
		metadata := reader.LatestAppMetadata()
		if told := fromJSON(metadata); told != nil {
			return nil, told
		}
		answer.Errors = nil
		if err := json.Unmarshal(metadata, &answer); err != nil {
			return nil, &Error{Code: "internal", Message: "the server sent a batch without JSON: " + err.Error()}
		}
		if len(answer.Errors) > 0 {
			return nil, answer.Errors[0]
		}
		if vectors, err = appendVectors(vectors, reader.RecordBatch()); err != nil {
			return nil, err
		}
	}
	if err := reader.Err(); err != nil && !errors.Is(err, io.EOF) {
		return nil, fromStatus(err, stream.Trailer())
	}
	if len(vectors) != numTexts {
		return nil, &Error{Code: "unavailable", Message: fmt.Sprintf("the server ended the exchange after %d of %d texts", len(vectors), numTexts)}
	}
	return vectors, nil
}

// appendVectors adds a batch's vectors as float32.
func appendVectors(vectors [][]float32, batch arrow.RecordBatch) ([][]float32, error) {
	places := batch.Schema().FieldIndices("vector")
	if len(places) != 1 {
		return nil, &Error{Code: "internal", Message: "the server sent a batch without vectors"}
	}
	lists, isDense := batch.Column(places[0]).(*array.FixedSizeList)
	if !isDense {
		return nil, invalid("output", "the model has no dense vectors")
	}
	width := int(lists.DataType().(*arrow.FixedSizeListType).Len())
	first := lists.Data().Offset() * width
	var scales *array.Float32
	if at := batch.Schema().FieldIndices("scale"); len(at) == 1 {
		scales, _ = batch.Column(at[0]).(*array.Float32)
	}
	var ranges *ranges
	if raw, has := batch.Schema().Metadata().GetValue("fletcher.ranges"); has {
		if err := json.Unmarshal([]byte(raw), &ranges); err != nil || len(ranges.Start) != width || len(ranges.Step) != width {
			return nil, &Error{Code: "internal", Message: "the server sent ranges that cannot be read"}
		}
	}
	for row := range lists.Len() {
		if lists.IsNull(row) {
			return nil, &Error{Code: "internal", Message: "the server sent a row without a vector and without an error"}
		}
		begin := first + row*width
		vector, err := floats(lists.ListValues(), begin, width)
		if err != nil {
			return nil, err
		}
		for place := range vector {
			if scales != nil {
				vector[place] *= scales.Value(row)
			} else if ranges != nil {
				vector[place] = ranges.Start[place] + (vector[place]+128.5)*ranges.Step[place]
			}
		}
		vectors = append(vectors, vector)
	}
	return vectors, nil
}

// ranges of int8 vectors: the least value and the step of each dimension.
type ranges struct {
	Start []float32 `json:"start"`
	Step  []float32 `json:"step"`
}

func floats(values arrow.Array, first, width int) ([]float32, error) {
	switch typed := values.(type) {
	case *array.Float32:
		return slices.Clone(typed.Float32Values()[first : first+width]), nil
	case *array.Float16:
		return convert(typed.Values()[first:first+width], float16.Num.Float32), nil
	case *array.Int8:
		return convert(typed.Int8Values()[first:first+width], func(value int8) float32 { return float32(value) }), nil
	}
	return nil, invalid("dtype", fmt.Sprintf("vectors are %s, which this client does not read", values.DataType()))
}

func convert[T any](values []T, to func(T) float32) []float32 {
	converted := make([]float32, len(values))
	for place, value := range values {
		converted[place] = to(value)
	}
	return converted
}
