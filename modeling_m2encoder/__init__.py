"""M2-Encoder for transformers: `import modeling_m2encoder`, then `AutoModel.from_pretrained(folder)`.

Importing registers the classes, so that checkpoints load without `trust_remote_code`.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    TokenizersBackend,
)

from .configuration_m2encoder import SIZES, M2EncoderConfig
from .image_processing_m2encoder import M2EncoderImageProcessorPil
from .modeling_m2encoder import (
    M2EncoderModel,
    M2EncoderPreTrainedModel,
    M2EncoderTextModel,
    M2EncoderVisionModel,
)
from .processing_m2encoder import M2EncoderProcessor

AutoConfig.register("m2_encoder", M2EncoderConfig)
AutoModel.register(M2EncoderConfig, M2EncoderModel)
AutoModelForZeroShotImageClassification.register(M2EncoderConfig, M2EncoderModel)
# The same class under both names: with PIL alone under "pil", transformers warns wherever torchvision is installed.
AutoImageProcessor.register(
    M2EncoderConfig,
    image_processor_classes={"torchvision": M2EncoderImageProcessorPil, "pil": M2EncoderImageProcessorPil},
)
AutoTokenizer.register(M2EncoderConfig, fast_tokenizer_class=TokenizersBackend)
AutoProcessor.register(M2EncoderConfig, M2EncoderProcessor)

__all__ = [
    "SIZES",
    "M2EncoderConfig",
    "M2EncoderImageProcessorPil",
    "M2EncoderModel",
    "M2EncoderPreTrainedModel",
    "M2EncoderProcessor",
    "M2EncoderTextModel",
    "M2EncoderVisionModel",
]
