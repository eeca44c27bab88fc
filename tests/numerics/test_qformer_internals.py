"""What the Q-Former uses of transformers beyond its documented interface is checked when it is built."""

import pytest
import transformers
from tiny_qformer import build_qformer
from transformers.models.instructblip.modeling_instructblip import (
    InstructBlipQFormerLayer,
    InstructBlipQFormerMultiHeadAttention,
)


@pytest.mark.parametrize("method", ["feed_forward_chunk", "feed_forward_chunk_query"])
def test_a_missing_part_is_named_with_the_version(monkeypatch, method):
    monkeypatch.delattr(InstructBlipQFormerLayer, method)
    with pytest.raises(RuntimeError, match=rf"transformers {transformers.__version__} .*no attribute '{method}'"):
        build_qformer()


def test_a_renamed_projection_is_named(monkeypatch):
    build = InstructBlipQFormerMultiHeadAttention.__init__

    def renamed(self, *arguments, **named):
        build(self, *arguments, **named)
        self.q_proj = self.query
        del self.query

    monkeypatch.setattr(InstructBlipQFormerMultiHeadAttention, "__init__", renamed)
    with pytest.raises(RuntimeError, match="no attribute 'query'"):
        build_qformer()
