"""The command lines, one module for each: parse the arguments, call the library, print the result.

``python -m milora_jax.PACKAGE`` is the module of that name; ``train.py`` and ``serve.py`` are beside the
package and use the same helpers. ``command_line`` has the common parts, ``options`` makes options of a
dataclass of settings, ``config_options`` reads ``--config FILE --config.group.field=value``, and ``startup``
prepares the process.
"""
