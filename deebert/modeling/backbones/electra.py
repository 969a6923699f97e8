"""DeeBERT on HF's ELECTRA: BERT's layers, embeddings that may be narrower, and HF's head of two layers."""

from torch import Tensor
from transformers import ElectraConfig, ElectraForSequenceClassification, ElectraModel
from transformers.models.electra.modeling_electra import ElectraEncoder

from deebert.modeling.auto_classes import AutoLoading, register
from deebert.modeling.classifier import StockHeadClassifier
from deebert.modeling.config import HighwayConfig
from deebert.modeling.encoder import HighwayEncoder, HighwayModel


class DeeElectraConfig(HighwayConfig, ElectraConfig):
    """ElectraConfig with the fields of early exit (see HighwayConfig)."""


class DeeElectraEncoder(HighwayEncoder, ElectraEncoder):
    """ELECTRA's layers with an off-ramp after each but the last."""


class DeeElectraModel(HighwayModel, ElectraModel):
    """ELECTRA with off-ramps in its encoder; on its own it gives the output of ElectraModel."""

    config_class = DeeElectraConfig
    encoder_class = DeeElectraEncoder

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """See HighwayModel. Small ELECTRAs have narrow embeddings, which are projected to the layers' width."""
        embeddings = super().embed(input_ids, token_type_ids)
        return self.embeddings_project(embeddings) if hasattr(self, "embeddings_project") else embeddings


@register
class DeeElectraForSequenceClassification(AutoLoading, StockHeadClassifier, ElectraForSequenceClassification):
    """ELECTRA for classification whose samples exit at the first off-ramp that is certain enough."""

    config_class = DeeElectraConfig
    model_class = DeeElectraModel
