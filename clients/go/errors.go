package longbowfletcher

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"regexp"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// details is the trailer with an error's JSON.
const details = "grpc-status-details-bin"

// Error of a call. Use errors.As to get it. Codes are listed in docs/wire.md.
type Error struct {
	// Code names the kind of error, such as `unknown_model`.
	Code string `json:"code"`
	// Message says what came and what is allowed.
	Message string `json:"message"`
	// Field is the field, column or row that is wrong, if there is one.
	Field string `json:"field,omitempty"`
	// Allowed lists what is allowed, if the server knows.
	Allowed []string `json:"allowed,omitempty"`
	// RetryAfterMs is the time after which another attempt may succeed, if the server knows.
	RetryAfterMs float64 `json:"retry_after_ms,omitempty"`
	// Status is the code of gRPC.
	Status codes.Code `json:"-"`
}

func (e *Error) Error() string { return e.Code + ": " + e.Message }

// Retryable says whether another attempt may succeed.
func (e *Error) Retryable() bool {
	switch e.Code {
	case "overloaded", "draining", "store_unavailable", "journal_full", "unavailable":
		return true
	}
	return false
}

// Unwrap lets errors.Is find context.Canceled and context.DeadlineExceeded.
func (e *Error) Unwrap() error {
	switch e.Status {
	case codes.Canceled:
		return context.Canceled
	case codes.DeadlineExceeded:
		return context.DeadlineExceeded
	}
	return nil
}

// RowError is the error of a row without a vector.
type RowError struct {
	// Row is the row's number, counted from the first one that was sent.
	Row int64 `json:"row"`
	// ID is the row's id: a string, a number or nil.
	ID      any    `json:"id"`
	Code    string `json:"code"`
	Message string `json:"message"`
}

func (e RowError) Error() string { return e.Code + ": " + e.Message }

func invalid(field, message string) *Error {
	return &Error{Code: "invalid_command", Message: message, Field: field, Status: codes.InvalidArgument}
}

// arrowDetail is what Arrow puts behind a text.
var arrowDetail = regexp.MustCompile(`\. Detail: [^.]*$`)

// fromStatus is the error of a call that ended with err.
func fromStatus(err error, trailer metadata.MD) *Error {
	var known *Error
	if errors.As(err, &known) {
		return known
	}
	found, isStatus := status.FromError(err)
	if !isStatus {
		switch {
		case errors.Is(err, context.Canceled):
			return &Error{Code: "cancelled", Message: err.Error(), Status: codes.Canceled}
		case errors.Is(err, context.DeadlineExceeded):
			return &Error{Code: "deadline_exceeded", Message: err.Error(), Status: codes.DeadlineExceeded}
		case errors.Is(err, io.EOF):
			return &Error{Code: "unavailable", Message: "the server ended the call early", Status: codes.Unavailable}
		}
		return &Error{Code: "internal", Message: err.Error(), Status: codes.Unknown}
	}
	for _, raw := range trailer.Get(details) {
		if told := fromJSON([]byte(raw)); told != nil {
			told.Status = found.Code()
			return told
		}
	}
	code := "internal"
	switch found.Code() {
	case codes.Unavailable:
		code = "unavailable"
	case codes.DeadlineExceeded:
		code = "deadline_exceeded"
	case codes.Canceled:
		code = "cancelled"
	case codes.Unauthenticated:
		code = "unauthenticated"
	case codes.PermissionDenied:
		code = "unauthorized"
	case codes.InvalidArgument, codes.NotFound, codes.Unimplemented, codes.ResourceExhausted:
		code = "invalid_command"
	}
	message := arrowDetail.ReplaceAllString(found.Message(), "")
	return &Error{Code: code, Message: message, Status: found.Code()}
}

// fromJSON is the error that a server wrote; nil if the JSON has another form.
func fromJSON(raw []byte) *Error {
	var told Error
	if json.Unmarshal(raw, &told) != nil || told.Code == "" {
		return nil
	}
	return &told
}

// retryPolicy says how often and when a call is tried again.
type retryPolicy struct {
	most           int
	first, longest time.Duration
}

// wait waits before the next attempt, after a number of failures in a row without progress. It
// returns the error if no attempt is left.
func (r retryPolicy) wait(ctx context.Context, failures int, failed *Error) error {
	if !failed.Retryable() || failures > r.most {
		return failed
	}
	pause := min(r.first<<(failures-1), r.longest)
	pause = pause/2 + rand.N(pause/2+1)
	pause = max(pause, time.Duration(failed.RetryAfterMs*float64(time.Millisecond)))
	select {
	case <-time.After(pause):
		return nil
	case <-ctx.Done():
		return fromStatus(ctx.Err(), nil)
	}
}
