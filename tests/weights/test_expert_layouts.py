from __future__ import annotations

import torch

from sl_serve.weights.layout import IMAGE_ALIGNMENT_BYTES, LayerLayout, largest_layer
from tests.weights.expert_layouts import LAYOUT, N_LAYERS, PARAMS, every_layout


@every_layout
def test_an_image_is_the_dense_part_and_then_expert_by_expert(layout: LayerLayout) -> None:
    assert [layout.n_experts(i) for i in range(N_LAYERS)] == [0, 5, 0, 5]
    for layer in range(N_LAYERS):
        ends = [layout.dense_bytes(layer)]
        for expert in range(layout.n_experts(layer)):
            place = layout.expert_range(layer, expert)
            assert place.start == ends[-1] and place.start % IMAGE_ALIGNMENT_BYTES == 0
            assert layout.experts_bytes(layer, [expert]) == place.stop - place.start
            ends.append(place.stop)
        assert layout.stored_bytes(layer) == ends[-1] <= layout.image_bytes
        for segment in layout.segments(layer):
            start, stop = segment.offset_bytes, segment.offset_bytes + segment.size_bytes
            place = slice(0, ends[0])
            if segment.expert is not None:
                place = layout.expert_range(layer, segment.expert)
            assert place.start <= start < stop <= place.stop
    assert layout.segments(1)[-1].source(0, 1) == "l1.e4.bias"


def test_views_of_experts_are_their_bytes_alone() -> None:
    image = torch.zeros(LAYOUT.image_bytes, dtype=torch.uint8)
    experts = LAYOUT.experts(image, 3)
    assert set(LAYOUT.views(image, 3)) == {"own"} and list(experts) == list(range(5))
    experts[2]["up"].fill_(1.0)
    experts[2]["bias"].fill_(1.0)
    place = LAYOUT.expert_range(3, 2)
    assert image.count_nonzero() == image[place].count_nonzero() > 0
    assert experts[2] is experts[2]
    assert len(LAYOUT.experts(image, 0)) == 0


def test_the_largest_layer() -> None:
    assert largest_layer(PARAMS, N_LAYERS) == 0
    assert largest_layer(PARAMS[:1] + PARAMS[2:], N_LAYERS) == 1
    assert largest_layer(PARAMS[:1], N_LAYERS) == 0
