"""The command lines, one module for each: parse the arguments, call the library, print the result.

``python -m milora_jax.ROOM`` is the module of that name; ``train.py`` and ``serve.py`` stand beside the
package and parse with the same helpers. ``command_line`` has what they share, ``options`` makes options of a
dataclass of settings, ``config_options`` reads ``--config FILE --config.group.field=value``.
"""
