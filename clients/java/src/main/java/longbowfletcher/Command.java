package longbowfletcher;

import java.util.HashMap;
import java.util.Map;

/** Options of a call. Further fields are listed in docs/wire.md. */
public final class Command {
  private final Map<String, Object> fields = new HashMap<>();

  /** One of the server's models: NAME or NAME@HASH. */
  public Command model(String name) {
    return field("model", name);
  }

  /** Text in front of each text. A single word is the name of one of the model's prompts. */
  public Command prompt(String prompt) {
    return field("prompt", prompt);
  }

  /** Number of leading dimensions to keep, for models that allow it. */
  public Command dims(int dims) {
    return field("dims", dims);
  }

  /** Name of an upload, so that a later call with the same rows continues it. */
  public Command uploadId(String id) {
    return field("upload_id", id);
  }

  /** Any field of the command. */
  public Command field(String name, Object value) {
    fields.put(name, value);
    return this;
  }

  /** The fields, with others as defaults. */
  Map<String, Object> over(Map<String, ?> defaults) {
    Map<String, Object> all = new HashMap<>(defaults);
    all.putAll(fields);
    return all;
  }
}
