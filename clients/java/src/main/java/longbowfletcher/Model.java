package longbowfletcher;

import java.util.Map;

/** Model that a server runs. */
public record Model(
    String name, String hash, int dim, int maxLength, boolean isDefault, Map<String, String> prompts) {}
