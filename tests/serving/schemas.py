"""Random JSON schemas of the kinds that clients send."""

TEXTS = ("red", "green", "\u00e9t\u00e9", 'say "x"', "a b", "")
PATTERNS = ("^[a-c]{1,4}$", "^\\d{3}-\\d{2}$", "^(yes|no)$", "^[A-Z][a-z]{0,5}$")


def pick(rng, values):
    """One of some values, of Python's types."""
    return values[int(rng.integers(len(values)))]


def random_schema(rng, depth=0, names=()):
    """A schema that some value of a hundred tokens or so fits.

    Args:
      names: of definitions that it may refer to.
    """
    if depth == 0:
        definitions = {f"d{i}": random_schema(rng, 2) for i in range(int(rng.integers(0, 3)))}
        schema = random_schema(rng, 1, tuple(definitions))
        return {**schema, "$defs": definitions} if definitions else schema
    kinds = ["text", "number", "integer", "boolean", "null", "enum", "const", "pattern"]
    if depth < 4:
        kinds += ["object"] * 4 + ["array"] * 2 + ["anyOf"] * 2
    if names:
        kinds += ["ref"] * 2
    kind = pick(rng, kinds)
    low = int(rng.integers(-50, 50))
    if kind == "text":
        return {"type": "string", "minLength": int(rng.integers(0, 3)), "maxLength": int(rng.integers(3, 9))}
    if kind == "pattern":
        return {"type": "string", "pattern": pick(rng, PATTERNS)}
    if kind in ("number", "integer"):
        ends = pick(rng, [("minimum", "maximum"), ("exclusiveMinimum", "exclusiveMaximum")])
        return {"type": kind, ends[0]: low, ends[1]: low + int(rng.integers(2, 300))}
    if kind in ("boolean", "null"):
        return {"type": kind}
    if kind == "enum":
        return {"enum": [pick(rng, TEXTS), low, None, True, [1, "x"], {"a": 1.5}][: int(rng.integers(1, 7))]}
    if kind == "const":
        return {"const": pick(rng, [*TEXTS, 3, None])}
    if kind == "ref":
        return {"$ref": f"#/$defs/{pick(rng, names)}"}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1, names) for _ in range(int(rng.integers(1, 4)))]}
    if kind == "array":
        items = random_schema(rng, depth + 1, names)
        return {
            "type": "array",
            "items": items,
            "minItems": int(rng.integers(0, 2)),
            "maxItems": int(rng.integers(2, 4)),
        }
    fields = {f"k{i}": random_schema(rng, depth + 1, names) for i in range(int(rng.integers(0, 4)))}
    required = [name for name in fields if rng.random() < 0.6]
    return {"type": "object", "properties": fields, "required": required, "additionalProperties": False}
