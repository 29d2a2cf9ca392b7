"""What a model family's experts look like, as data; finding, reading and replacing them.

Importing the package registers the one supported family that transformers does not know.
"""

from moesvd_core.architectures import deepseek as deepseek
