// Command conformance runs Fletcher's conformance cases with this client. It reads cases as JSON
// lines and writes their outcomes as JSON lines (tests/conformance/README.md).
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"os"
	"time"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/memory"

	fletcher "longbowfletcher"
)

type testCase struct {
	Call       string         `json:"call"`
	Address    string         `json:"address"`
	Token      string         `json:"token"`
	MaxRetries int            `json:"max_retries"`
	Texts      []string       `json:"texts"`
	Command    map[string]any `json:"command"`
	Dataset    string         `json:"dataset"`
	Rows       int64          `json:"rows"`
	BatchRows  int64          `json:"batch_rows"`
	NullTexts  []int64        `json:"null_texts"`
	PauseMs    int            `json:"pause_ms"`
	CancelMs   int            `json:"cancel_ms"`
	DeadlineMs int            `json:"deadline_ms"`
}

func main() {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 64<<20)
	out := json.NewEncoder(os.Stdout)
	for lines.Scan() {
		var one testCase
		if err := json.Unmarshal(lines.Bytes(), &one); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
		if err := out.Encode(run(one)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
	}
}

func run(one testCase) map[string]any {
	ctx := context.Background()
	cancel := func() {}
	switch {
	case one.DeadlineMs > 0:
		ctx, cancel = context.WithTimeout(ctx, time.Duration(one.DeadlineMs)*time.Millisecond)
	case one.CancelMs > 0:
		ctx, cancel = context.WithCancel(ctx)
		time.AfterFunc(time.Duration(one.CancelMs)*time.Millisecond, cancel)
	}
	defer cancel()
	client, err := fletcher.Connect(context.Background(), one.Address, fletcher.WithToken(one.Token), fletcher.WithMaxRetries(one.MaxRetries))
	if err != nil {
		return failure(err)
	}
	defer client.Close()
	var found any
	switch one.Call {
	case "embed", "embed_queries", "embed_documents":
		options := []fletcher.EmbedOption{}
		for name, value := range one.Command {
			options = append(options, fletcher.WithField(name, value))
		}
		embed := client.Embed
		if one.Call == "embed_queries" {
			embed = client.EmbedQueries
		} else if one.Call == "embed_documents" {
			embed = client.EmbedDocuments
		}
		found, err = embed(ctx, one.Texts, options...)
	case "put":
		options := []fletcher.PutOption{}
		for name, value := range one.Command {
			options = append(options, fletcher.WithPutField(name, value))
		}
		found, err = client.Put(ctx, one.Dataset, schema, batches(one), options...)
	default:
		return map[string]any{"skipped": one.Call}
	}
	if err != nil {
		return failure(err)
	}
	return map[string]any{"answer": found}
}

func failure(err error) map[string]any {
	var row fletcher.RowError
	if errors.As(err, &row) {
		return map[string]any{"row_error": row}
	}
	var told *fletcher.Error
	if !errors.As(err, &told) {
		return map[string]any{"error": map[string]any{"code": "", "message": err.Error()}}
	}
	return map[string]any{"error": map[string]any{"code": told.Code, "message": told.Message, "field": told.Field, "status": told.Status.String()}}
}

var schema = arrow.NewSchema([]arrow.Field{
	{Name: "id", Type: arrow.PrimitiveTypes.Int64},
	{Name: "text", Type: arrow.BinaryTypes.String, Nullable: true},
}, nil)

// batches are rows whose ids are their numbers.
func batches(one testCase) iter.Seq2[arrow.RecordBatch, error] {
	nulls := map[int64]bool{}
	for _, row := range one.NullTexts {
		nulls[row] = true
	}
	return func(yield func(arrow.RecordBatch, error) bool) {
		for first := int64(0); first < one.Rows; first += one.BatchRows {
			builder := array.NewRecordBuilder(memory.DefaultAllocator, schema)
			for row := first; row < min(one.Rows, first+one.BatchRows); row++ {
				builder.Field(0).(*array.Int64Builder).Append(row)
				if nulls[row] {
					builder.Field(1).AppendNull()
				} else {
					builder.Field(1).(*array.StringBuilder).Append(fmt.Sprintf("text %d", row))
				}
			}
			batch := builder.NewRecordBatch()
			time.Sleep(time.Duration(one.PauseMs) * time.Millisecond)
			goOn := yield(batch, nil)
			batch.Release()
			builder.Release()
			if !goOn {
				return
			}
		}
	}
}
