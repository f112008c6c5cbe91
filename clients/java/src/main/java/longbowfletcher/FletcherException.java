package longbowfletcher;

import com.fasterxml.jackson.databind.JsonNode;
import io.grpc.Context;
import io.grpc.Status;
import java.util.ArrayList;
import java.util.List;
import java.util.Set;
import java.util.concurrent.TimeoutException;
import org.apache.arrow.flight.CallStatus;
import org.apache.arrow.flight.FlightRuntimeException;

/** Error of a call. Codes are listed in docs/wire.md. */
public class FletcherException extends RuntimeException {
  private static final long serialVersionUID = 1L;
  private static final String DETAILS = "grpc-status-details-bin";
  private static final Set<String> RETRYABLE =
      Set.of("overloaded", "draining", "store_unavailable", "journal_full", "unavailable");

  private final String code;
  private final String field;
  private final transient List<String> allowed;
  private final double retryAfterMs;

  FletcherException(String code, String message, String field, List<String> allowed, double retryAfterMs, Throwable cause) {
    super(message, cause);
    this.code = code;
    this.field = field;
    this.allowed = List.copyOf(allowed);
    this.retryAfterMs = retryAfterMs;
  }

  FletcherException(String code, String message) {
    this(code, message, "", List.of(), 0, null);
  }

  static FletcherException invalid(String field, String message) {
    return new FletcherException("invalid_command", message, field, List.of(), 0, null);
  }

  /** The kind of error, such as {@code unknown_model}. */
  public String code() {
    return code;
  }

  /** The field, column or row that is wrong; empty if there is none. */
  public String field() {
    return field;
  }

  /** What is allowed; empty if the server does not know. */
  public List<String> allowed() {
    return allowed;
  }

  /** Time after which another attempt may succeed, or 0. */
  public double retryAfterMs() {
    return retryAfterMs;
  }

  /** Whether another attempt may succeed. */
  public boolean isRetryable() {
    return RETRYABLE.contains(code);
  }

  /** The error of a call that failed. */
  static FletcherException from(Throwable failed) {
    if (failed instanceof FletcherException known) {
      return known;
    }
    if (failed instanceof FlightRuntimeException flight) {
      CallStatus status = flight.status();
      boolean isTold = status.metadata() != null && status.metadata().containsKey(DETAILS);
      byte[] raw = isTold ? status.metadata().getByte(DETAILS) : null;
      FletcherException told = raw == null ? null : fromJson(raw, failed);
      return told != null ? told : new FletcherException(codeOf(status), cut(status.description()), "", List.of(), 0, failed);
    }
    String code = switch (Status.fromThrowable(failed).getCode()) {
      case UNAVAILABLE -> "unavailable";
      case CANCELLED -> "cancelled";
      case DEADLINE_EXCEEDED -> "deadline_exceeded";
      default -> "internal";
    };
    return new FletcherException(code, String.valueOf(failed.getMessage()), "", List.of(), 0, failed);
  }

  /** The error of a context of gRPC that was cancelled. */
  static FletcherException cancelled(Context context) {
    boolean late = context.cancellationCause() instanceof TimeoutException;
    return late
        ? new FletcherException("deadline_exceeded", "the deadline of the context has passed")
        : new FletcherException("cancelled", "the context was cancelled");
  }

  private static String codeOf(CallStatus status) {
    return switch (status.code()) {
      case UNAVAILABLE -> "unavailable";
      case TIMED_OUT -> "deadline_exceeded";
      case CANCELLED -> "cancelled";
      case UNAUTHENTICATED -> "unauthenticated";
      case UNAUTHORIZED -> "unauthorized";
      case INVALID_ARGUMENT, NOT_FOUND, UNIMPLEMENTED, RESOURCE_EXHAUSTED -> "invalid_command";
      default -> "internal";
    };
  }

  /** The text without what Arrow puts behind it. */
  private static String cut(String text) {
    return text == null ? "" : text.replaceFirst("\\. Detail: [^.]*$", "");
  }

  /** The error that a server wrote; null if the JSON has another form. */
  static FletcherException fromJson(byte[] raw, Throwable cause) {
    JsonNode told = Json.treeOrNull(raw);
    if (told == null || told.path("code").asText().isEmpty()) {
      return null;
    }
    List<String> allowed = new ArrayList<>();
    told.path("allowed").forEach(one -> allowed.add(one.asText()));
    return new FletcherException(
        told.path("code").asText(), told.path("message").asText(), told.path("field").asText(""),
        allowed, told.path("retry_after_ms").asDouble(), cause);
  }
}
