package longbowfletcher;

import com.fasterxml.jackson.core.JsonProcessingException;
import com.fasterxml.jackson.databind.DeserializationFeature;
import com.fasterxml.jackson.databind.JsonNode;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.PropertyNamingStrategies;
import java.io.IOException;
import org.apache.arrow.memory.ArrowBuf;

/** JSON of the wire, with names in snake case. */
final class Json {
  private static final ObjectMapper MAPPER =
      new ObjectMapper()
          .setPropertyNamingStrategy(PropertyNamingStrategies.SNAKE_CASE)
          .configure(DeserializationFeature.FAIL_ON_UNKNOWN_PROPERTIES, false)
          .configure(DeserializationFeature.FAIL_ON_NULL_FOR_PRIMITIVES, false);

  private Json() {}

  static byte[] write(Object value) {
    try {
      return MAPPER.writeValueAsBytes(value);
    } catch (JsonProcessingException error) {
      throw FletcherException.invalid("command", "the command cannot be written as JSON: " + error.getOriginalMessage());
    }
  }

  static JsonNode treeOrNull(byte[] raw) {
    try {
      return MAPPER.readTree(raw);
    } catch (IOException error) {
      return null;
    }
  }

  static JsonNode tree(byte[] raw) {
    JsonNode tree = treeOrNull(raw);
    if (tree == null) {
      throw new FletcherException("internal", "the server sent something that is not JSON");
    }
    return tree;
  }

  static <T> T as(JsonNode tree, Class<T> type) {
    try {
      return MAPPER.treeToValue(tree, type);
    } catch (JsonProcessingException error) {
      throw new FletcherException("internal", "the server sent other JSON than expected: " + error.getOriginalMessage());
    }
  }

  static byte[] bytes(ArrowBuf buffer) {
    byte[] raw = new byte[buffer == null ? 0 : (int) buffer.readableBytes()];
    if (buffer != null) {
      buffer.getBytes(buffer.readerIndex(), raw);
    }
    return raw;
  }
}
