// Package longbowfletcher is a client of Fletcher, a server that turns text into vectors and stores
// them. It speaks Arrow Flight.
//
//	client, err := longbowfletcher.Connect(ctx, "grpc://127.0.0.1:8815")
//	vectors, err := client.EmbedQueries(ctx, []string{"play chess"})
//	summary, err := client.Put(ctx, "articles", texts)
package longbowfletcher

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net/url"
	"time"

	"github.com/apache/arrow-go/v18/arrow/flight"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
)

// Version of this client, which is that of the Fletcher it was released with.
const Version = "0.1.0"

// wireVersion is the version of Fletcher's calls that this client speaks.
const wireVersion = 1

const (
	// The server sends smaller messages unless it is asked for others.
	maxMessageBytes = 64 << 20
	// gRPC's servers end connections on which clients ping more often than every five minutes.
	pingInterval = 6 * time.Minute
	checkTimeout = 20 * time.Second
)

// Client of one server. Safe for use by several goroutines.
type Client struct {
	flight flight.Client
	token  string
	retry  retryPolicy
}

type settings struct {
	token string
	tls   *tls.Config
	dial  []grpc.DialOption
	retry retryPolicy
}

// Option of Connect.
type Option func(*settings)

// WithToken sends a bearer token with every call.
func WithToken(token string) Option { return func(s *settings) { s.token = token } }

// WithTLS sets certificates, for addresses that begin with grpc+tls://.
func WithTLS(config *tls.Config) Option { return func(s *settings) { s.tls = config } }

// WithDialOptions adds options of gRPC.
func WithDialOptions(options ...grpc.DialOption) Option {
	return func(s *settings) { s.dial = append(s.dial, options...) }
}

// WithMaxRetries sets how often a call is tried again in a row without progress. The default is 6.
func WithMaxRetries(retries int) Option { return func(s *settings) { s.retry.most = retries } }

// Connect connects to a server, such as grpc://HOST:PORT or grpc+tls://HOST:PORT. It fails if the
// server does not answer, does not take the token, or speaks another version of the wire.
func Connect(ctx context.Context, address string, options ...Option) (*Client, error) {
	chosen := settings{retry: retryPolicy{most: 6, first: 200 * time.Millisecond, longest: 10 * time.Second}}
	for _, option := range options {
		option(&chosen)
	}
	target, err := url.Parse(address)
	if err != nil || target.Host == "" || target.Port() == "" {
		return nil, invalid("address", fmt.Sprintf("`address` is %q, expected grpc://HOST:PORT or grpc+tls://HOST:PORT", address))
	}
	transport := insecure.NewCredentials()
	switch target.Scheme {
	case "grpc", "grpc+tcp":
		if chosen.tls != nil {
			return nil, invalid("tls", fmt.Sprintf("TLS is given, but %s is not encrypted; use grpc+tls://", address))
		}
	case "grpc+tls":
		config := chosen.tls
		if config == nil {
			config = &tls.Config{MinVersion: tls.VersionTLS12}
		}
		transport = credentials.NewTLS(config)
	default:
		return nil, invalid("address", fmt.Sprintf("`address` is %q, expected grpc:// or grpc+tls://", address))
	}
	dial := append([]grpc.DialOption{
		grpc.WithTransportCredentials(transport),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessageBytes)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: pingInterval, Timeout: time.Minute}),
	}, chosen.dial...)
	connection, err := flight.NewClientWithMiddleware(target.Host, nil, nil, dial...)
	if err != nil {
		return nil, invalid("address", err.Error())
	}
	client := &Client{flight: connection, token: chosen.token, retry: chosen.retry}
	if err := client.checkServer(ctx, address); err != nil {
		_ = connection.Close()
		return nil, err
	}
	return client, nil
}

// Close ends the connection, and with it all calls.
func (c *Client) Close() error { return c.flight.Close() }

// Action calls an action with a JSON body, and decodes its JSON answer.
func (c *Client) Action(ctx context.Context, name string, body, answer any) error {
	var raw []byte
	if body != nil {
		var err error
		if raw, err = json.Marshal(body); err != nil {
			return invalid("body", err.Error())
		}
	}
	stream, err := c.flight.DoAction(c.outgoing(ctx), &flight.Action{Type: name, Body: raw})
	if err != nil {
		return fromStatus(err, nil)
	}
	result, err := stream.Recv()
	if err != nil {
		return fromStatus(err, stream.Trailer())
	}
	if answer == nil {
		return nil
	}
	if err := json.Unmarshal(result.Body, answer); err != nil {
		return &Error{Code: "internal", Message: fmt.Sprintf("the server did not answer `%s` with JSON: %v", name, err)}
	}
	return nil
}

func (c *Client) checkServer(ctx context.Context, address string) error {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	var health struct {
		Status string `json:"status"`
		Wire   int    `json:"wire"`
	}
	if err := c.Action(ctx, "health", nil, &health); err != nil {
		return err
	}
	if health.Status != "ok" || health.Wire != wireVersion {
		return invalid("address", fmt.Sprintf("%s speaks version %d of Fletcher's wire, this client version %d; use the client of the server's release", address, health.Wire, wireVersion))
	}
	return nil
}

// outgoing is the context of a call, with the token.
func (c *Client) outgoing(ctx context.Context) context.Context {
	if c.token == "" {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+c.token)
}

func descriptor(command any) (*flight.FlightDescriptor, error) {
	raw, err := json.Marshal(command)
	if err != nil {
		return nil, invalid("command", err.Error())
	}
	return &flight.FlightDescriptor{Type: flight.DescriptorCMD, Cmd: raw}, nil
}
