"""Where the original keeps its RoBERTa, for code written for it; the classes are in modeling/backbones/roberta.py."""

from deebert.modeling.backbones.roberta import *  # noqa: F403
