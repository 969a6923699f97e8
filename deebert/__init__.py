"""DeeBERT: dynamic early exiting for BERT and RoBERTa (Xin et al., ACL 2020)."""

__version__ = "0.5.0"
