package longbowfletcher;

import io.grpc.Context;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;

/** How often and when a call is tried again. */
record Retry(int most) {
  private static final long FIRST_MS = 200;
  private static final long LONGEST_MS = 10_000;

  /** Waits before the next attempt, after a number of failures in a row without progress. */
  void waitAfter(int failures, FletcherException failed) {
    if (!failed.isRetryable() || failures > most) {
      throw failed;
    }
    long pause = Math.min(FIRST_MS << Math.min(failures - 1, 10), LONGEST_MS);
    pause = pause / 2 + ThreadLocalRandom.current().nextLong(pause / 2 + 1);
    pause = Math.max(pause, (long) failed.retryAfterMs());
    Context context = Context.current();
    CountDownLatch cancelled = new CountDownLatch(1);
    Context.CancellationListener listener = one -> cancelled.countDown();
    context.addListener(listener, Runnable::run);
    try {
      if (cancelled.await(pause, TimeUnit.MILLISECONDS)) {
        throw FletcherException.cancelled(context);
      }
    } catch (InterruptedException error) {
      throw interrupted();
    } finally {
      context.removeListener(listener);
    }
  }

  static FletcherException interrupted() {
    Thread.currentThread().interrupt();
    return new FletcherException("cancelled", "the thread was interrupted");
  }
}
