import numpy as np
import pytest

from moee_analysis.extraction.cluster.clustering import NOISE
from moee_analysis.extraction.cluster.clusters_to_router import Assignment, Partition, by_expert
from tests.helpers.layers import layer_of, part_of, parts_of, sample_of

IMAGES, TOKENS, DIM = 6, 5, 4
ROWS = IMAGES * TOKENS
CENTRES = np.random.default_rng(1).normal(size=(3, DIM)).astype("f4")
ROUTED = Partition(centres=CENTRES)


@pytest.fixture(scope="module")
def layer():
    rng = np.random.default_rng(0)
    image, position = np.divmod(np.arange(ROWS, dtype=np.int32), TOKENS)
    inputs = rng.normal(size=(ROWS, DIM)).astype("f2")
    return layer_of(
        sample_of(np.zeros((ROWS, 6), "f2"), inputs=inputs, image=image, position=position)
    )


def nearest(layer):
    """Expert of every token by the cosine to its centre, one after the other."""
    unit = CENTRES / np.linalg.norm(CENTRES, axis=1, keepdims=True)
    return np.array([np.argmax(unit @ x) for x in layer.sample.inputs.astype("f4")])


# Which expert


def test_without_leading_tokens_every_token_goes_where_the_router_sends_it(layer):
    routed, members = Assignment((), ROUTED).of(layer)
    np.testing.assert_array_equal(routed, nearest(layer))
    np.testing.assert_array_equal(members, routed)
    assert routed.dtype == members.dtype == np.int64


@pytest.mark.parametrize(("prefix", "leading"), [((0,), 1), ((0, 1), 2), ((0, 1, 1), 2)])
def test_leading_tokens_have_the_experts_before_those_of_the_others(layer, prefix, leading):
    assignment = Assignment(prefix, ROUTED)
    assert (assignment.leading, assignment.experts) == (leading, leading + 3)
    assert assignment.kinds.tolist() == [0] * leading + [1, 1, 1]
    for found in assignment.of(layer):
        for row, position in enumerate(layer.sample.position):
            own = position < len(prefix)
            expected = prefix[position] if own else leading + nearest(layer)[row]
            assert found[row] == expected


def test_a_partition_of_one_expert_takes_all_others(layer):
    routed, members = Assignment((0,), Partition()).of(layer)
    np.testing.assert_array_equal(routed, layer.sample.position > 0)
    np.testing.assert_array_equal(members, routed)
    for partition in (ROUTED, Partition()):  # of leading tokens alone there is nothing to route
        assert [
            found.tolist() for found in Assignment((0,), partition).of(part_of(layer, 5, 6))
        ] == [[0], [0]]


# Which one a token counts for


def labelled():
    """Every third token counts for an expert of its own choice, or for none."""
    rows = np.arange(1, ROWS, 3)
    return Partition(centres=CENTRES, rows=rows, labels=np.arange(len(rows)) % 4 - 1)


@pytest.mark.parametrize("prefix", [(), (0,), (0, 1)])
@pytest.mark.parametrize("cuts", [(), (7,), (1, 2, 11, 29), range(1, ROWS)])
def test_members_are_known_by_the_number_of_their_row_also_in_parts(layer, prefix, cuts):
    partition, leading = labelled(), len(set(prefix))
    own = dict(zip(partition.rows.tolist(), partition.labels.tolist(), strict=True))
    routed, members = [], []
    for part in parts_of(layer, cuts):
        found = Assignment(prefix, partition).of(part)
        routed.extend(found[0])
        members.extend(found[1])
    for row, position in enumerate(layer.sample.position):
        if position < len(prefix):
            assert members[row] == routed[row] == prefix[position]
        else:
            label = own.get(row, NOISE)
            assert members[row] == (NOISE if label == NOISE else leading + label)
            assert routed[row] == leading + nearest(layer)[row]


# Experts that get nothing


def test_experts_of_the_partition_that_get_no_token_are_left_out():
    assignment = Assignment((0,), labelled())
    alive = assignment.alive(np.array([0, 5, 0, 2]))
    assert alive.prefix == (0,)
    assert alive.experts == 3
    np.testing.assert_array_equal(alive.partition.centres, CENTRES[[0, 2]])
    np.testing.assert_array_equal(alive.partition.rows, labelled().rows)
    number = {0: 0, 1: NOISE, 2: 1, NOISE: NOISE}
    assert alive.partition.labels.tolist() == [number[label] for label in labelled().labels]
    assert assignment.alive(np.array([0, 1, 2, 3])).partition is assignment.partition


@pytest.mark.parametrize("routed", [[3, 4, 0, 0], [3, 0, 0, 0]])
def test_a_single_expert_that_is_left_is_no_partition(routed):
    partition = Partition(0.25, centres=CENTRES)
    left = Assignment((0,), partition).alive(np.array(routed)).partition
    assert left.reason == "all tokens route to one expert"
    assert (left.noise_share, left.centres) == (0.25, None)
    assert Assignment((0,), Partition()).alive(np.array([4, 0])).experts == 2  # stays if alone


# What tells assignments apart


def test_a_digest_is_that_of_all_that_decides_who_gets_what():
    plain = labelled()
    different = [
        Assignment((), plain),
        Assignment((0,), plain),
        Assignment((), Partition()),
        Assignment((), ROUTED),
        Assignment((), Partition(centres=CENTRES, root=np.eye(DIM, dtype="f4"))),
        Assignment((), Partition(centres=CENTRES, rows=plain.rows + 1, labels=plain.labels)),
        Assignment((), Partition(centres=CENTRES, rows=plain.rows, labels=plain.labels[::-1])),
    ]
    assert len({each.digest for each in different}) == len(different)
    assert Assignment((), plain).digest == Assignment((), labelled()).digest
    same = Partition(0.5, centres=CENTRES, route_agreement=0.25)
    assert Assignment((), same).digest == Assignment((), ROUTED).digest


def test_rows_by_expert_are_ascending_and_those_of_none_are_left_out():
    experts = np.array([2, -1, 0, 2, 0, -1, 2])
    assert [rows.tolist() for rows in by_expert(experts, 4)] == [[2, 4], [], [0, 3, 6], []]
    assert [len(rows) for rows in by_expert(np.zeros(0, dtype=int), 2)] == [0, 0]
