"""The mazes of PointMaze: maps, routes, demonstrations and the ball's motion."""

from __future__ import annotations

import networkx
import numpy as np
import pytest

from rlalign.core.registry import UserError
from rlalign.data.mazes.demonstrations import demonstrate, draw_plan, expert, random_ends
from rlalign.data.mazes.maps import (
    JITTER,
    MAZES,
    RADIUS,
    Maze,
    cells_of,
    centres,
    find_maze,
    is_free,
    to_plan,
    to_points,
    wall_distance,
)
from rlalign.data.mazes.routes import cell_pairs, kind_of, routes
from rlalign.data.mazes.simulator import DAMPING, FORCE, MASS, STEP, advance, simulate

UMAZE, MEDIUM, LARGE = MAZES["umaze"], MAZES["medium"], MAZES["large"]
LOOP = ((3, 2), (6, 2))
"""Cells of Medium with a route on each side of its island."""


@pytest.fixture(params=sorted(MAZES))
def maze(request: pytest.FixtureRequest) -> Maze:
    return MAZES[request.param]


def test_the_maps_are_closed_and_in_one_piece(maze: Maze) -> None:
    walls = maze.walls
    assert walls[[0, -1]].all() and walls[:, [0, -1]].all()
    # as many free cells as a flood from the first of them fills
    assert len({b for a, b in cell_pairs(maze.name, 0) if a == maze.free[0]}) == (~walls).sum()
    left, right, bottom, top = maze.extent
    assert (right - left, top - bottom) == walls.shape[::-1]


def test_an_unknown_maze_is_named() -> None:
    with pytest.raises(UserError, match="maze must be one of umaze, medium, large, got 'medum'"):
        find_maze("medum")


def test_the_middle_of_a_cell_lies_in_it_and_x_grows_to_the_right(maze: Maze) -> None:
    np.testing.assert_array_equal(cells_of(maze, centres(maze, maze.free)), maze.free)
    below_left, above_right = centres(maze, [(len(maze.rows) - 2, 1), (1, len(maze.rows[0]) - 2)])
    assert (below_left < above_right).all()


def test_every_free_place_lies_within_one_unit_of_a_latent(maze: Maze) -> None:
    points_BH2 = demonstrate(maze, np.random.default_rng(0), 8, 16).points_BH2
    plan_B2H = to_plan(points_BH2, maze)
    assert plan_B2H.shape == (8, 2, 16) and np.abs(plan_B2H).max() < 1.0
    np.testing.assert_allclose(to_points(plan_B2H, maze), points_BH2, atol=1e-12)


def test_distances_to_walls() -> None:
    # middles of a corridor, of a wall, and beside the end of the wall in the middle of UMaze
    points = np.array([[0.0, 1.0], [0.0, 0.0], [0.5 + 0.3, 0.0], [0.5 + 0.3, 0.5 + 0.4]])
    np.testing.assert_allclose(wall_distance(UMAZE, points), [0.5, 0.0, 0.3, 0.5])
    np.testing.assert_array_equal(is_free(UMAZE, points, 0.35), [True, False, False, True])


def test_the_shortest_route_is_the_breadth_first_one(maze: Maze) -> None:
    graph = networkx.grid_2d_graph(*maze.walls.shape)
    graph.remove_nodes_from(map(tuple, np.argwhere(maze.walls).tolist()))
    for start, goal in cell_pairs(maze.name, 1)[:: 7 if maze is LARGE else 3]:
        first, *others = routes(maze.name, start, goal)
        assert len(first) - 1 == networkx.shortest_path_length(graph, start, goal)
        assert (first[0], first[-1]) == (start, goal)
        assert all(len(other) >= len(first) for other in others)


def test_medium_has_two_routes_around_its_island_and_umaze_one() -> None:
    one, other = routes("medium", *LOOP)
    assert {(4, 2), (5, 1)} & set(one) and {(3, 3), (4, 4)} & set(other)
    kinds = [kind_of(MEDIUM, centres(MEDIUM, way)) for way in (one, other)]
    assert abs(kinds[0][0] - kinds[1][0]) == 1
    assert all(len(routes("umaze", *pair)) == 1 for pair in cell_pairs("umaze", 1))


def test_cells_that_are_too_far_apart_are_refused() -> None:
    with pytest.raises(UserError, match="apart must be <= 6 in the maze umaze, got 7"):
        random_ends(UMAZE, np.random.default_rng(0), apart=7)


def test_demonstrations_lead_from_start_to_goal_in_equal_steps_clear_of_walls(maze: Maze) -> None:
    points_BH2 = demonstrate(maze, np.random.default_rng(1), 60, 32).points_BH2
    ends_B22 = points_BH2[:, [0, -1]]
    middles = centres(maze, cells_of(maze, ends_B22).reshape(-1, 2)).reshape(-1, 2, 2)
    assert np.abs(ends_B22 - middles).max() <= JITTER
    assert is_free(maze, points_BH2, 2 * RADIUS).all()
    step_BH = np.linalg.norm(np.diff(points_BH2, axis=1), axis=2)
    # chords of equal arcs: shorter where the line bends
    assert (step_BH.min(axis=1) > 0.7 * step_BH.max(axis=1)).all()


def test_both_routes_are_shown_equally_often() -> None:
    shown = demonstrate(MEDIUM, np.random.default_rng(2), 600, 8)
    cells = [tuple(map(tuple, pair)) for pair in cells_of(MEDIUM, shown.points_BH2[:, [0, -1]])]
    routes_of = [len(routes("medium", *pair)) for pair in cells]
    # 60 or more draws: three standard deviations are at most 0.2
    of_two = shown.route_B[np.array(routes_of) == 2]
    assert len(of_two) > 60 and abs(of_two.mean() - 0.5) < 0.2


def test_the_expert_always_arrives_and_noise_almost_never(maze: Maze) -> None:
    rng = np.random.default_rng(3)
    ends_B22 = np.stack([random_ends(maze, rng, apart=3) for _ in range(100)])
    starts_B2, goals_B2 = ends_B22[:, 0], ends_B22[:, 1]
    outcome = simulate(maze, expert(maze, starts_B2, goals_B2, 32), starts_B2, goals_B2)
    assert outcome.reached_B.all()
    straight = np.linalg.norm(goals_B2 - starts_B2, axis=1) - 0.45
    assert (outcome.seconds_B >= straight / np.hypot(6, 6)).all()
    noise = to_points(rng.standard_normal((100, 2, 32)), maze)
    assert simulate(maze, noise, starts_B2, goals_B2).reached_B.mean() <= 0.03


def test_every_demonstration_arrives_by_either_route(maze: Maze) -> None:
    shown = demonstrate(maze, np.random.default_rng(4), 100, 32)
    outcome = simulate(maze, shown.points_BH2, shown.starts_B2, shown.goals_B2)
    assert outcome.reached_B.all() and outcome.contact_B.sum() == 0


def test_a_plan_through_a_wall_is_stuck_at_it() -> None:
    starts_B2, goals_B2 = centres(UMAZE, [(1, 1)]), centres(UMAZE, [(3, 1)])
    through_BH2 = np.linspace(starts_B2, goals_B2, 16, axis=1)
    outcome = simulate(UMAZE, through_BH2, starts_B2, goals_B2)
    assert not outcome.reached_B.any() and outcome.contact_B[0] > 200
    # even where no way point lies in the wall
    across = through_BH2.copy()
    across[0, 1:-1] = np.where(np.arange(14)[:, None] < 7, starts_B2, goals_B2)
    assert is_free(UMAZE, across).all()
    outcome = simulate(UMAZE, across, starts_B2, goals_B2)
    assert not outcome.reached_B.any()
    assert outcome.path_BT2[0, -1, 1] == pytest.approx(0.5 + RADIUS)


def test_a_constant_push_gives_the_closed_form_of_a_damped_mass() -> None:
    """v_n = F/d (1 - q^n) with q = 1 - h d / (m + h d), until 5 m/s."""
    place, velocity = np.array([[-4.5, 3.0]]), np.zeros((1, 2))
    for n in range(1, 13):
        place, velocity, touched = advance(LARGE, place, velocity, np.array([[0.7, 0.0]]))
        q = 1.0 - STEP * DAMPING / (MASS + STEP * DAMPING)
        assert velocity[0, 0] == pytest.approx(0.7 * FORCE / DAMPING * (1.0 - q**n), rel=1e-12)
        assert not touched.any()
    for _ in range(10):
        place, velocity, _ = advance(LARGE, place, velocity, np.array([[9.0, 0.0]]))
    assert velocity[0, 0] <= 5.0 + STEP * FORCE / MASS


def test_the_ball_stays_out_of_walls_whatever_pushes_it(maze: Maze) -> None:
    rng = np.random.default_rng(5)
    place = np.repeat(centres(maze, maze.free), 8, axis=0)
    velocity = np.zeros_like(place)
    action = rng.uniform(-1, 1, place.shape)
    for n in range(300):
        if n % 20 == 0:
            action = rng.uniform(-3, 3, place.shape)
        place, velocity, _ = advance(maze, place, velocity, action)
        assert wall_distance(maze, place).min() >= RADIUS - 1e-9
    assert len(np.unique(cells_of(maze, place), axis=0)) > len(maze.free) / 2


def test_a_wall_takes_the_velocity_towards_it_alone() -> None:
    place, velocity = np.array([[0.0, 1.39]]), np.array([[2.0, 3.0]])
    place, velocity, touched = advance(UMAZE, place, velocity, np.zeros((1, 2)))
    assert touched.all() and velocity[0, 1] == 0.0 and place[0, 1] == pytest.approx(1.4)
    assert velocity[0, 0] == pytest.approx(2.0 * MASS / (MASS + STEP * DAMPING))


def test_a_plan_alone_goes_as_among_others_and_one_with_nan_goes_nowhere() -> None:
    shown = demonstrate(MEDIUM, np.random.default_rng(6), 12, 16)
    points_BH2 = shown.points_BH2.copy()
    points_BH2[3, 5, 0] = np.nan
    together = simulate(MEDIUM, points_BH2, shown.starts_B2, shown.goals_B2)
    assert not together.reached_B[3] and np.isfinite(together.path_BT2).all()
    assert np.delete(together.reached_B, 3).all()
    for i in (0, 3, 11):
        alone = simulate(MEDIUM, points_BH2[[i]], shown.starts_B2[[i]], shown.goals_B2[[i]])
        assert alone.steps_B[0] == together.steps_B[i]
        np.testing.assert_array_equal(alone.path_BT2[0], together.path_BT2[i])


def test_a_lane_lies_beside_the_middle() -> None:
    ends = centres(UMAZE, [(1, 1), (1, 3)])
    left = draw_plan(UMAZE, ends, ((1, 1), (1, 2), (1, 3)), 0.2, 9)
    assert left[4, 1] == pytest.approx(1.2, abs=0.02) and left[4, 0] == pytest.approx(0.0)
    np.testing.assert_allclose(left[[0, -1]], ends)
