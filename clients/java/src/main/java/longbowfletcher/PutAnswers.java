package longbowfletcher;

import com.fasterxml.jackson.databind.JsonNode;
import java.util.ArrayDeque;
import java.util.Deque;
import java.util.function.BooleanSupplier;
import java.util.function.Consumer;
import org.apache.arrow.flight.FlightClient;
import org.apache.arrow.flight.PutResult;

/** Answers of one DoPut. Threads of gRPC deliver them, the caller's thread takes them. */
final class PutAnswers implements FlightClient.PutListener {
  // gRPC tells by no call of this listener that there is room to write.
  private static final long POLL_MS = 1;

  private final Deque<Ack> acks = new ArrayDeque<>();
  private Summary summary;
  private FletcherException error;
  private boolean isEnded;

  @Override
  public synchronized void onNext(PutResult result) {
    JsonNode told = Json.treeOrNull(Json.bytes(result.getApplicationMetadata()));
    String type = told == null ? "" : told.path("type").asText();
    if (type.equals("ack")) {
      acks.add(Json.as(told, Ack.class));
    } else if (type.equals("summary")) {
      summary = Json.as(told, Summary.class);
    }
    notifyAll();
  }

  @Override
  public synchronized void onError(Throwable failed) {
    isEnded = true;
    error = FletcherException.from(failed);
    notifyAll();
  }

  @Override
  public synchronized void onCompleted() {
    isEnded = true;
    notifyAll();
  }

  @Override
  public void getResult() {
    throw new UnsupportedOperationException("use waitForSummary");
  }

  @Override
  public boolean isCancelled() {
    return isEnded();
  }

  synchronized boolean isEnded() {
    return isEnded;
  }

  /** Waits until the connection can take a message and the upload has room for it. */
  void waitFor(BooleanSupplier isReady, BooleanSupplier hasRoom, Consumer<Ack> note) {
    while (true) {
      take(note);
      synchronized (this) {
        if (isEnded) {
          throw failure();
        }
        if (acks.isEmpty()) {
          boolean isFull = !hasRoom.getAsBoolean();
          if (!isFull && isReady.getAsBoolean()) {
            return;
          }
          pause(isFull ? 0 : POLL_MS);
        }
      }
    }
  }

  /** Waits for the end of the call. */
  Summary waitForSummary(Consumer<Ack> note) {
    while (true) {
      take(note);
      synchronized (this) {
        if (acks.isEmpty()) {
          if (isEnded) {
            if (error != null || summary == null) {
              throw failure();
            }
            return summary;
          }
          pause(0);
        }
      }
    }
  }

  /** Why a call ended: the server's reason if it told one, else the error of this side. */
  synchronized FletcherException reason(RuntimeException own) {
    return isEnded && error != null ? error : FletcherException.from(own);
  }

  private FletcherException failure() {
    return error != null ? error : new FletcherException("unavailable", "the server ended the upload early");
  }

  private void take(Consumer<Ack> note) {
    Ack ack;
    while ((ack = next()) != null) {
      note.accept(ack);
    }
  }

  private synchronized Ack next() {
    return acks.poll();
  }

  private void pause(long ms) {
    try {
      wait(ms);
    } catch (InterruptedException error) {
      throw Retry.interrupted();
    }
  }
}
