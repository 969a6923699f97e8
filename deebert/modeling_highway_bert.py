"""Where the original keeps its BERT, for code written for it; the classes are in modeling/backbones/bert.py."""

from deebert.modeling.backbones.bert import *  # noqa: F403
