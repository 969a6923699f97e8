"""Where the original keeps its RoBERTa, for code written for it; the classes are in modeling/roberta.py."""

from deebert.modeling.roberta import *  # noqa: F403
