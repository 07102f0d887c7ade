"""The interchangeable encoders, from full length to PRO-SCALE's, and the settings that all of them share."""

# The configurations of all families need this module of transformers, and are registered right after its import. They
# also need `encoders.configuration`, so the import must not begin in the middle of that.
import transformers.models.auto.configuration_auto  # noqa: F401
