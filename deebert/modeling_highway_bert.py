"""Where the original keeps its BERT, for code written for it; the classes are in modeling/bert.py."""

from deebert.modeling.bert import *  # noqa: F403
