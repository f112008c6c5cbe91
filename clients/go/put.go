package longbowfletcher

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"iter"
	"sync"

	"github.com/apache/arrow-go/v18/arrow"
	"github.com/apache/arrow-go/v18/arrow/array"
	"github.com/apache/arrow-go/v18/arrow/flight"
	"github.com/apache/arrow-go/v18/arrow/ipc"
	"github.com/apache/arrow-go/v18/arrow/memory"
	"google.golang.org/grpc/metadata"
)

// Most bytes that are sent and not acknowledged. They are kept in memory, to be sent again after a
// broken connection.
const windowBytes = 32 << 20

// Summary of an upload. Counts include earlier connections.
type Summary struct {
	UploadID         string     `json:"upload_id"`
	Complete         bool       `json:"complete"`
	RowsReceived     int64      `json:"rows_received"`
	RowsStored       int64      `json:"rows_stored"`
	RowsFailed       int64      `json:"rows_failed"`
	RowsDurable      int64      `json:"rows_durable"`
	RowsDeduplicated int64      `json:"rows_deduplicated"`
	Model            string     `json:"model"`
	Errors           []RowError `json:"errors"`
	ErrorsTruncated  bool       `json:"errors_truncated"`
}

// Ack is the progress of an upload.
type Ack struct {
	BatchID     int64 `json:"batch_id"`
	RowFirst    int64 `json:"row_first"`
	RowLast     int64 `json:"row_last"`
	RowsStored  int64 `json:"rows_stored"`
	RowsFailed  int64 `json:"rows_failed"`
	RowsDurable int64 `json:"rows_durable"`
}

type putSettings struct {
	command map[string]any
	onAck   func(Ack)
}

// PutOption changes how rows are stored.
type PutOption func(*putSettings)

// WithUploadID names the upload, so that a later call with the same rows continues it.
func WithUploadID(id string) PutOption { return WithPutField("upload_id", id) }

// WithPutField sets a field of the command (docs/wire.md), such as `mode` or `durability`.
func WithPutField(name string, value any) PutOption {
	return func(s *putSettings) { s.command[name] = value }
}

// OnAck is called for acknowledgements, on the goroutine of Put.
func OnAck(call func(Ack)) PutOption { return func(s *putSettings) { s.onAck = call } }

// Put embeds rows and stores them in a dataset. The batches have a column `text` and, if wanted, an
// `id`. Batches should have 1 to 4 MiB. If the connection breaks, or the server or its store is
// unavailable, Put connects again, and sends what the server does not have.
func (c *Client) Put(ctx context.Context, dataset string, schema *arrow.Schema, batches iter.Seq2[arrow.RecordBatch, error], options ...PutOption) (*Summary, error) {
	chosen := putSettings{command: map[string]any{"dataset": dataset}, onAck: func(Ack) {}}
	for _, option := range options {
		option(&chosen)
	}
	_, named := chosen.command["upload_id"]
	if !named {
		var id [16]byte
		_, _ = rand.Read(id[:]) // it never fails
		chosen.command["upload_id"] = hex.EncodeToString(id[:])
	}
	next, stop := iter.Pull2(batches)
	defer stop()
	upload := &upload{client: c, settings: chosen, schema: schema, next: next}
	defer upload.release()
	return upload.run(ctx, named)
}

// message of an upload: rows with their number.
type message struct {
	batch    arrow.RecordBatch
	rowFirst int64
	numBytes int64
}

func (m message) rowLast() int64 { return m.rowFirst + m.batch.NumRows() - 1 }

type upload struct {
	client   *Client
	settings putSettings
	schema   *arrow.Schema
	next     func() (arrow.RecordBatch, error, bool)
	nextRow  int64
	unacked  []message // in the order of rows
	inFlight int64     // bytes of messages that were sent in this call and not acknowledged
	acked    int64     // rows before this one are acknowledged
	stored   [][2]int64
	ended    bool // all batches were read
}

func (u *upload) release() {
	for _, one := range u.unacked {
		one.batch.Release()
	}
	u.unacked = nil
}

func (u *upload) run(ctx context.Context, ask bool) (*Summary, error) {
	failures := 0
	for {
		before := u.acked
		var err error
		if ask {
			err = u.askStored(ctx)
		}
		if err == nil {
			var summary *Summary
			if summary, err = u.send(ctx); err == nil {
				return summary, nil
			}
		}
		if u.acked > before {
			failures = 0
		}
		failures++
		if err := u.client.retry.wait(ctx, failures, fromStatus(err, nil)); err != nil {
			return nil, err
		}
		ask = true
	}
}

// askStored asks which rows the server has, and drops messages with these rows.
func (u *upload) askStored(ctx context.Context) error {
	body := map[string]any{}
	for _, name := range []string{"upload_id", "dataset", "store"} {
		if value, has := u.settings.command[name]; has {
			body[name] = value
		}
	}
	var answer struct {
		Ranges [][2]int64 `json:"ranges"`
	}
	err := u.client.Action(ctx, "upload_status", body, &answer)
	var told *Error
	if err != nil && !(errors.As(err, &told) && told.Code == "unknown_dataset") {
		return err
	}
	u.stored = answer.Ranges
	if u.acked > 0 && !u.has(0, u.acked-1) {
		return &Error{Code: "upload_conflict", Field: "upload_id", Message: "acknowledged rows of the upload are gone from the dataset; send the whole upload again"}
	}
	left := u.unacked[:0]
	for _, one := range u.unacked {
		if u.has(one.rowFirst, one.rowLast()) {
			one.batch.Release()
		} else {
			left = append(left, one)
		}
	}
	u.unacked = left
	return nil
}

func (u *upload) has(first, last int64) bool {
	for _, one := range u.stored {
		if one[0] <= first && last <= one[1] {
			return true
		}
	}
	return false
}

// missing cuts rows to those that the server does not have.
func (u *upload) missing(whole message) []message {
	parts := []message{}
	first, last := whole.rowFirst, whole.rowLast()
	for row := first; row <= last; {
		end, isStored := last, false
		for _, one := range u.stored {
			if one[0] <= row && row <= one[1] {
				end, isStored = min(last, one[1]), true
			} else if row < one[0] {
				end = min(end, one[0]-1)
			}
		}
		if !isStored {
			part := whole.batch.NewSlice(row-first, end-first+1)
			parts = append(parts, message{part, row, whole.numBytes * part.NumRows() / whole.batch.NumRows()})
		}
		row = end + 1
	}
	whole.batch.Release()
	return parts
}

// read is the next messages to send; none at the end.
func (u *upload) read() ([]message, error) {
	for !u.ended {
		batch, err, ok := u.next()
		if !ok {
			u.ended = true
			break
		}
		if err != nil {
			return nil, &Error{Code: "invalid_command", Field: "batches", Message: "the batches cannot be read: " + err.Error()}
		}
		if batch.NumRows() == 0 {
			continue
		}
		var parts []message
		for _, piece := range cutBatch(batch) {
			parts = append(parts, u.missing(message{piece, u.nextRow, batchBytes(piece)})...)
			u.nextRow += piece.NumRows()
		}
		if len(parts) > 0 {
			u.unacked = append(u.unacked, parts...)
			return parts, nil
		}
	}
	return nil, nil
}

// cutBatch cuts a batch into slices of about a message each.
func cutBatch(batch arrow.RecordBatch) (slices []arrow.RecordBatch) {
	rows := batch.NumRows()
	step := max(1, rows*messageBytes/max(1, batchBytes(batch)))
	for first := int64(0); first < rows; first += step {
		slices = append(slices, batch.NewSlice(first, min(rows, first+step)))
	}
	return slices
}

func batchBytes(batch arrow.RecordBatch) (size int64) {
	for _, column := range batch.Columns() {
		size += int64(column.Data().SizeInBytes())
	}
	return size
}

// send sends all that is left by one DoPut.
func (u *upload) send(ctx context.Context) (*Summary, error) {
	describe, err := descriptor(u.settings.command)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(u.client.outgoing(ctx))
	defer cancel()
	stream, err := u.client.flight.DoPut(ctx)
	if err != nil {
		return nil, fromStatus(err, nil)
	}
	answers := newAnswers(stream)
	u.inFlight = 0
	writer := flight.NewRecordWriter(stream, ipc.WithSchema(u.schema))
	writer.SetFlightDescriptor(describe)
	sent := u.unacked
	batchID := int64(0)
	for {
		for _, one := range sent {
			fields, _ := json.Marshal(map[string]int64{"batch_id": batchID, "row_offset": one.rowFirst})
			batchID++
			if err := answers.waitForRoom(u, one); err != nil {
				return nil, err
			}
			u.inFlight += one.numBytes
			if writer.WriteWithAppMetadata(one.batch, fields) != nil {
				return nil, answers.failure()
			}
		}
		if sent, err = u.read(); err != nil {
			return nil, err
		}
		if len(sent) == 0 {
			break
		}
	}
	end, _ := json.Marshal(map[string]any{"end": true, "rows": u.nextRow})
	if batchID == 0 { // the schema is sent with a batch only
		builder := array.NewRecordBuilder(memory.DefaultAllocator, u.schema)
		nothing := builder.NewRecordBatch()
		err = writer.WriteWithAppMetadata(nothing, end)
		nothing.Release()
		builder.Release()
	} else {
		err = writer.WriteMetadata(end)
	}
	if err != nil || writer.Close() != nil || stream.CloseSend() != nil {
		return nil, answers.failure()
	}
	return answers.result(u)
}

// answers of one DoPut, read by a goroutine of its own.
type answers struct {
	changed *sync.Cond
	acks    []Ack
	summary *Summary
	err     error
	ended   bool
}

type putStream interface {
	Recv() (*flight.PutResult, error)
	Trailer() metadata.MD
}

func newAnswers(stream putStream) *answers {
	found := &answers{changed: sync.NewCond(&sync.Mutex{})}
	go func() {
		for {
			answer, err := stream.Recv()
			found.changed.L.Lock()
			if err != nil {
				found.ended = true
				if !errors.Is(err, io.EOF) {
					found.err = fromStatus(err, stream.Trailer())
				}
			} else {
				found.take(answer.AppMetadata)
			}
			found.changed.Broadcast()
			found.changed.L.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return found
}

func (a *answers) take(raw []byte) {
	var kind struct {
		Type string `json:"type"`
	}
	if json.Unmarshal(raw, &kind) != nil {
		return
	}
	switch kind.Type {
	case "ack":
		var ack Ack
		if json.Unmarshal(raw, &ack) == nil {
			a.acks = append(a.acks, ack)
		}
	case "summary":
		var summary Summary
		if json.Unmarshal(raw, &summary) == nil {
			a.summary = &summary
		}
	}
}

// waitForRoom waits until a message fits into the window of what is not acknowledged.
func (a *answers) waitForRoom(u *upload, one message) error {
	a.changed.L.Lock()
	defer a.changed.L.Unlock()
	for {
		a.note(u)
		switch {
		case a.ended || a.summary != nil:
			return a.failureLocked()
		case u.inFlight == 0 || u.inFlight+one.numBytes <= windowBytes:
			return nil
		}
		a.changed.Wait()
	}
}

// note drops acknowledged messages.
func (a *answers) note(u *upload) {
	for _, ack := range a.acks {
		for len(u.unacked) > 0 && u.unacked[0].rowLast() <= ack.RowLast {
			u.acked = u.unacked[0].rowLast() + 1
			u.inFlight = max(0, u.inFlight-u.unacked[0].numBytes)
			u.unacked[0].batch.Release()
			u.unacked = u.unacked[1:]
		}
		a.changed.L.Unlock()
		u.settings.onAck(ack)
		a.changed.L.Lock()
	}
	a.acks = nil
}

// failure waits for the end of a call that failed, and returns why it did.
func (a *answers) failure() error {
	a.changed.L.Lock()
	defer a.changed.L.Unlock()
	for !a.ended {
		a.changed.Wait()
	}
	return a.failureLocked()
}

func (a *answers) failureLocked() error {
	for !a.ended {
		a.changed.Wait()
	}
	if a.err != nil {
		return a.err
	}
	return &Error{Code: "unavailable", Message: "the server ended the upload early"}
}

// result waits for the end of the call, and returns its summary.
func (a *answers) result(u *upload) (*Summary, error) {
	a.changed.L.Lock()
	defer a.changed.L.Unlock()
	for {
		a.note(u)
		if a.ended {
			break
		}
		a.changed.Wait()
	}
	switch {
	case a.err != nil:
		return nil, a.err
	case a.summary == nil:
		return nil, &Error{Code: "unavailable", Message: "the server ended the upload without a summary"}
	}
	return a.summary, nil
}
