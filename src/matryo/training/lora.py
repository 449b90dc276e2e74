"""Low-rank adapters (LoRA, arXiv 2106.09685) by the peft package: put in before training, merged when it ends."""

from sentence_transformers import SentenceTransformer

from matryo.core.errors import InputError, MissingExtraError
from matryo.training.config import LoraConfig


def add_adapter(model: SentenceTransformer, config: LoraConfig) -> None:
    """Freeze the encoder and give it adapters to train."""
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("peft", "lora", "lora") from error
    if not model.has_peft_compatible_model():
        raise InputError("lora adapts a transformer, and this model has none; drop lora")
    wanted = config.target_modules
    options = peft.LoraConfig(
        task_type=peft.TaskType.FEATURE_EXTRACTION,
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(wanted) if isinstance(wanted, tuple) else wanted,
    )
    try:
        model.add_adapter(options)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"lora: {reason}; name layers of the model in target_modules") from error


def merged(model: SentenceTransformer, whole: SentenceTransformer) -> SentenceTransformer:
    """`whole`, which is the model without adapters, with the trained weights, adapters added in."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    weights = {
        name.replace(".base_layer.", "."): value for name, value in model.state_dict().items() if ".lora_" not in name
    }
    whole.load_state_dict(weights)
    return whole
