"""Kimi-VL on a current vLLM, without remote code.

vLLM carries Kimi-VL's model and configuration. Tokenizer, image processor and processor are Python files of the model's
repository, written for transformers 4, which neither load on transformers 5 nor should be trusted blindly. This package
does the same work, registers it where vLLM and transformers look, and adds a parser for the Thinking model's reasoning.
"""

from __future__ import annotations

from pathlib import Path

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
REASONING_PARSER = "kimi_vl"


def register() -> None:
    """Called by vLLM at the start of each of its processes (entry point ``vllm.general_plugins``)."""
    from PIL import Image
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
    from vllm import envs
    from vllm.reasoning import ReasoningParserManager
    from vllm.transformers_utils.chat_templates.registry import register_chat_template_fallback_path
    from vllm.transformers_utils.configs.kimi_vl import KimiVLConfig

    from vllm_kimi_vl.images import KimiVLImageProcessor
    from vllm_kimi_vl.processor import KimiVLProcessor
    from vllm_kimi_vl.tokenizer import TikTokenTokenizer

    # Without the configuration transformers would ask for the repository's own, which is remote code.
    AutoConfig.register(KimiVLConfig.model_type, KimiVLConfig, exist_ok=True)
    AutoTokenizer.register(KimiVLConfig, tokenizer_class=TikTokenTokenizer, exist_ok=True)
    AutoImageProcessor.register(KimiVLConfig, slow_image_processor_class=KimiVLImageProcessor, exist_ok=True)
    AutoProcessor.register(KimiVLConfig, KimiVLProcessor, exist_ok=True)
    # Only where the repository has no template of its own.
    register_chat_template_fallback_path(KimiVLConfig.model_type, CHAT_TEMPLATE)
    ReasoningParserManager.register_lazy_module(REASONING_PARSER, "vllm_kimi_vl.reasoning", "KimiVLReasoningParser")
    if envs.VLLM_MAX_IMAGE_PIXELS > 0:
        # vLLM's own check refuses an image with a clear 400; Pillow's, which comes before, ends in a 500.
        Image.MAX_IMAGE_PIXELS = None
