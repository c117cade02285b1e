"""The building blocks of a decoder, each a module of its own so that a probe can time it."""
