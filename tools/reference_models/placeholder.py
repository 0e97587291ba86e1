"""A third text encoder for the MMDiT that says nothing.

`StableDiffusion3Pipeline.from_pretrained(folder)` insists on a T5 encoder and its tokenizer; left out, they have to be
named as `None` in every call. The pipeline fills in zeros for a T5 that is `None`, and so does this one: its final
norm multiplies by zero. Its tokenizer drops every character, so prompts are never too long for it.
"""

from tokenizers import Regex, Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from .models import TEXT_WIDTH

__all__ = ["wordless_tokenizer", "zero_text_encoder"]

_VOCABULARY = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]


def zero_text_encoder() -> T5EncoderModel:
    """A T5 encoder as wide as the MMDiT's text input whose output is exactly zero."""
    config = T5Config(
        vocab_size=len(_VOCABULARY), d_model=2 * TEXT_WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1, use_cache=False
    )
    model = T5EncoderModel(config).eval()
    model.encoder.final_layer_norm.weight.data.zero_()
    return model


def wordless_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that gives the end token alone, whatever the prompt."""
    backend = Tokenizer(models.Unigram(_VOCABULARY, unk_id=2))
    backend.normalizer = normalizers.Replace(Regex(r"[\s\S]"), "")
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=512
    )
