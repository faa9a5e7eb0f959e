"""M2-Encoder for transformers: `import modeling_m2encoder`, then `AutoModel.from_pretrained(folder)`.

Importing registers the classes, so that checkpoints load without `trust_remote_code`.
"""

# First of all: it explains a failure that every import of transformers would meet.
from . import torchvision_check  # noqa: F401, I001
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForPreTraining,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    TokenizersBackend,
)

from .configuration_m2encoder import SIZES, M2EncoderConfig
from .image_processing_m2encoder import M2EncoderImageProcessor, M2EncoderImageProcessorPil
from .modeling_m2encoder import (
    M2EncoderModel,
    M2EncoderPreTrainedModel,
    M2EncoderTextModel,
    M2EncoderVisionModel,
)
from .modeling_m2encoder_pretraining import M2EncoderForPreTraining
from .processing_m2encoder import M2EncoderProcessor

AutoConfig.register("m2_encoder", M2EncoderConfig)
AutoModel.register(M2EncoderConfig, M2EncoderModel)
AutoModelForZeroShotImageClassification.register(M2EncoderConfig, M2EncoderModel)
AutoModelForPreTraining.register(M2EncoderConfig, M2EncoderForPreTraining)
# transformers takes the first where torchvision is installed; `backend="pil"` pins the other.
AutoImageProcessor.register(
    M2EncoderConfig,
    image_processor_classes={"torchvision": M2EncoderImageProcessor, "pil": M2EncoderImageProcessorPil},
)
AutoTokenizer.register(M2EncoderConfig, fast_tokenizer_class=TokenizersBackend)
AutoProcessor.register(M2EncoderConfig, M2EncoderProcessor)

# A model that is loaded here, tuned and saved by whatever library keeps the `auto_map` of its folder; with this it
# also takes along the code which that names. The image processors are imported by the processor's file and so copied.
M2EncoderConfig.register_for_auto_class()
M2EncoderModel.register_for_auto_class()
M2EncoderForPreTraining.register_for_auto_class("AutoModelForPreTraining")
M2EncoderProcessor.register_for_auto_class()

__all__ = [
    "SIZES",
    "M2EncoderConfig",
    "M2EncoderForPreTraining",
    "M2EncoderImageProcessor",
    "M2EncoderImageProcessorPil",
    "M2EncoderModel",
    "M2EncoderPreTrainedModel",
    "M2EncoderProcessor",
    "M2EncoderTextModel",
    "M2EncoderVisionModel",
]
