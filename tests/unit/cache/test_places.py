"""Where model actors run, given what Ray tells of its nodes."""

import pytest

from stages.cluster.shares import places_on
from stages.config import ExtractConfig
from stages.errors import UserError


def node(name, *, alive=True, **resources):
    return {"NodeID": name, "Alive": alive, "Resources": resources}


def placed(nodes, tasks=100, **settings):
    return [tuple(place) for place in places_on(nodes, tasks, ExtractConfig(**settings))]


def test_each_gpu_gets_an_actor_and_its_share_of_the_cores():
    nodes = [node("a", CPU=16.0, GPU=4.0), node("b", CPU=6.0, GPU=1.0), node("c", CPU=32.0)]
    assert placed(nodes) == [("a", 1, 4)] * 4 + [("b", 1, 6)]


def test_without_a_gpu_each_living_node_with_a_core_gets_one():
    nodes = [node("a", CPU=4.0), node("head", CPU=0.0), node("gone", alive=False, CPU=4.0), node("b", CPU=2.0)]
    assert placed(nodes) == [("a", 0, 4), ("b", 0, 2)]


def test_actors_are_as_many_as_set_as_far_as_gpus_or_cores_go():
    assert placed([node("a", CPU=8.0, GPU=4.0)], model_actors=2) == [("a", 1, 4)] * 2
    assert placed([node("a", CPU=8.0, GPU=2.0)], model_actors=5) == [("a", 1, 4)] * 2
    assert placed([node("a", CPU=8.0)], model_actors=3) == [("a", 0, 2)] * 3
    assert placed([node("a", CPU=2.0)], model_actors=5) == [("a", 0, 1)] * 2


def test_no_more_actors_than_videos():
    assert placed([node("a", CPU=8.0, GPU=8.0)], tasks=2) == [("a", 1, 1)] * 2


def test_a_cluster_without_a_core_is_refused():
    with pytest.raises(UserError, match="no node of the Ray cluster has a CPU core to give"):
        placed([node("head", CPU=0.0)])
