package longbowfletcher;

import com.fasterxml.jackson.databind.JsonNode;
import java.nio.charset.StandardCharsets;
import java.util.List;
import java.util.Map;
import org.apache.arrow.vector.FieldVector;
import org.apache.arrow.vector.Float2Vector;
import org.apache.arrow.vector.Float4Vector;
import org.apache.arrow.vector.TinyIntVector;
import org.apache.arrow.vector.VectorSchemaRoot;
import org.apache.arrow.vector.complex.FixedSizeListVector;

/** Vectors of a batch as float32. */
final class Vectors {
  private Vectors() {}

  static void append(List<float[]> vectors, VectorSchemaRoot batch) {
    FieldVector column = batch.getVector("vector");
    if (column == null) {
      throw new FletcherException("internal", "the server sent a batch without vectors");
    }
    if (!(column instanceof FixedSizeListVector lists)) {
      throw FletcherException.invalid("output", "the model has no dense vectors");
    }
    int width = lists.getListSize();
    FieldVector values = lists.getDataVector();
    Float4Vector scales = (Float4Vector) batch.getVector("scale");
    float[][] ranges = ranges(batch.getSchema().getCustomMetadata(), width);
    for (int row = 0; row < batch.getRowCount(); row++) {
      if (lists.isNull(row)) {
        throw new FletcherException("internal", "the server sent a row without a vector and without an error");
      }
      float[] vector = new float[width];
      for (int place = 0; place < width; place++) {
        float value = number(values, row * width + place);
        if (scales != null) {
          value *= scales.get(row);
        } else if (ranges != null) {
          value = ranges[0][place] + (value + 128.5f) * ranges[1][place];
        }
        vector[place] = value;
      }
      vectors.add(vector);
    }
  }

  private static float number(FieldVector values, int place) {
    if (values instanceof Float4Vector typed) {
      return typed.get(place);
    }
    if (values instanceof Float2Vector typed) {
      return typed.getValueAsFloat(place);
    }
    if (values instanceof TinyIntVector typed) {
      return typed.get(place);
    }
    throw FletcherException.invalid("dtype", "vectors are " + values.getField().getType() + ", which this client does not read");
  }

  /** The least value and the step of each dimension, for int8 vectors with ranges; else null. */
  private static float[][] ranges(Map<String, String> metadata, int width) {
    String raw = metadata == null ? null : metadata.get("fletcher.ranges");
    if (raw == null) {
      return null;
    }
    JsonNode told = Json.tree(raw.getBytes(StandardCharsets.UTF_8));
    float[][] ranges = new float[2][width];
    if (told.path("start").size() != width || told.path("step").size() != width) {
      throw new FletcherException("internal", "the server sent ranges that cannot be read");
    }
    for (int place = 0; place < width; place++) {
      ranges[0][place] = (float) told.get("start").get(place).asDouble();
      ranges[1][place] = (float) told.get("step").get(place).asDouble();
    }
    return ranges;
  }
}
