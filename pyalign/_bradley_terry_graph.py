"""When a Bradley-Terry likelihood has a maximum, and which players are to blame where it has none.

Ford 1957: plain maximum likelihood exists just where every player can be reached from every other over battles won, a
tie counting as one either way. Davidson's tie parameter asks for more, see :func:`ties_dominate`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


def strongly_connected(num_players: int, winners: Ints, losers: Ints) -> bool:
    """Whether player 0 reaches all players over battles won, and is reached by them."""
    for source, target in ((winners, losers), (losers, winners)):
        reached = np.zeros(num_players, bool)
        reached[:1] = True
        before = 0
        while before < (now := int(np.count_nonzero(reached))) < num_players:
            reached[target[reached[source]]] = True
            before = now
        if not reached.all():
            return False
    return True


def strong_components(num_players: int, source: Ints, target: Ints) -> list[list[int]]:
    """Strongly connected components in topological order, by Tarjan's algorithm without recursion."""
    order = np.argsort(source, kind="stable")
    neighbours = target[order].tolist()
    begins = np.searchsorted(source[order], np.arange(num_players + 1)).tolist()
    index, low, on_stack = [-1] * num_players, [0] * num_players, [False] * num_players
    stack: list[int] = []
    components: list[list[int]] = []
    counter = 0
    for root in range(num_players):
        if index[root] >= 0:
            continue
        path = [(root, begins[root])]
        while path:
            player, at = path.pop()
            if index[player] < 0:
                index[player] = low[player] = counter
                counter += 1
                stack.append(player)
                on_stack[player] = True
            elif at > begins[player]:
                low[player] = min(low[player], low[neighbours[at - 1]])
            while at < begins[player + 1]:
                other = neighbours[at]
                at += 1
                if index[other] < 0:
                    path += [(player, at), (other, begins[other])]
                    break
                if on_stack[other]:
                    low[player] = min(low[player], index[other])
            else:
                if low[player] == index[player]:
                    component: list[int] = []
                    while not component or component[-1] != player:
                        component.append(stack.pop())
                        on_stack[component[-1]] = False
                    components.append(sorted(component))
    return components[::-1]


def explain(
    num_players: int, winners: Ints, losers: Ints, players: Ints, names: Sequence[object]
) -> tuple[str, list[list[int]]] | None:
    """What keeps the maximum from existing, as a sentence and the groups of players in it; None if nothing does.

    Args:
        winners, losers: (E,) ends of every distinct edge; both ways for ties.
        players: (P,) their numbers in the groups.
        names: how the sentence calls the players of those numbers.
    """

    def listed(group: list[int]) -> str:
        return (
            "[" + ", ".join(str(names[i]) for i in group[:10]) + (f", ... ({len(group)})]" if len(group) > 10 else "]")
        )

    def called(group: list[int]) -> str:
        return f"player {names[group[0]]}" if len(group) == 1 else f"players {listed(group)}"

    seen = np.zeros(num_players, bool)
    seen[winners] = seen[losers] = True
    if not seen.all():
        absent = players[~seen].tolist()
        return f"{called(absent)} in no battle", [absent]
    ends = np.concatenate((winners, losers)), np.concatenate((losers, winners))
    apart = [players[group].tolist() for group in strong_components(num_players, *ends)]
    if len(apart) > 1:
        apart.sort(key=lambda group: (-len(group), group))
        shown = "; ".join(listed(group) for group in apart[:5]) + ("; ..." if len(apart) > 5 else "")
        return f"the battles leave {len(apart)} groups of players that never met: {shown}", apart
    groups = strong_components(num_players, winners, losers)
    if len(groups) == 1:
        return None
    component = np.empty(num_players, np.int64)
    for number, group in enumerate(groups):
        component[group] = number
    crossing = component[winners] != component[losers]
    lost = set(component[losers[crossing]].tolist())
    won = set(component[winners[crossing]].tolist())
    groups = [players[group].tolist() for group in groups]
    unbeaten = [group for number, group in enumerate(groups) if number not in lost]
    beaten = [group for number, group in enumerate(groups) if number not in won]
    if len(groups) == 2:  # the smaller one's story is the other's
        unbeaten, beaten = (unbeaten, []) if len(unbeaten[0]) <= len(beaten[0]) else ([], beaten)
    parts: list[str] = []
    for named, verb in ((unbeaten, "won"), (beaten, "lost")):
        alone = sorted(group[0] for group in named if len(group) == 1)
        if alone:
            parts.append(f"{called(alone)} {verb} every battle")
        parts += [f"{called(group)} {verb} every battle with the others" for group in named if len(group) > 1]
    return "; ".join(parts), groups


def ties_dominate(num_players: int, winners: Ints, losers: Ints, tied: tuple[Ints, Ints]) -> bool:
    """Whether Davidson's likelihood rises forever as its tie parameter and the strengths' gaps grow together.

    With log nu growing like t and strengths like t u, it does not fall just where u_winner - u_loser >= 2 for every win
    and |u_i - u_j| <= 2 for every tie. Such u exist unless some circle holds more wins than ties: a negative cycle,
    found as Bellman and Ford find one.
    """
    source = np.concatenate((winners, *tied))
    target = np.concatenate((losers, *tied[::-1]))
    cost = np.ones(len(source), np.int64)
    cost[: len(winners)] = -1
    distance = np.zeros(num_players, np.int64)
    for _ in range(num_players):
        shorter = distance.copy()
        np.minimum.at(shorter, target, distance[source] + cost)
        if np.array_equal(shorter, distance):
            return True
        distance = shorter
    return False
