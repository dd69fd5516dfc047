"""One budget of time: every layer is routed, pruned for all tokens alike, or left dense.

What a layer takes is a fixed time, and one for every neuron or dimension that is kept; what it
loses is the cost of those that are dropped. Chosen is what loses least within the time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moee_analysis.extraction.attention import AttentionPlan
from moee_analysis.extraction.budget import Sizes
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.cross_token_fisher import scale_by_coherence
from moee_analysis.extraction.experts.layer_experts import LayerExperts
from moee_analysis.extraction.lagrangian import Candidates, Option, choose_options
from moee_analysis.extraction.prices import DENSE, LOW_RANK, Prices, Way
from moee_analysis.extraction.record.token_source import TokenSource

PARTS = "scores", "values"
Ways = Sequence[Way]
Options = dict[str, dict[str, Option]]  # by the name of a layer, and that of a way


def allocate_in_time(
    tokens: TokenSource,
    ways: Ways,
    attentions: Sequence[AttentionPlan],
    prices: Prices,
    config: ExtractConfig,
) -> tuple[list[LayerExperts], Sizes]:
    """Choose a way for every layer, with the reason, and its neurons; and the modes of attentions.

    The first of the ``ways`` says why a layer stays dense that has no other choice.
    """
    budget = TimeBudget(prices, attentions, config.macs_reduction)
    if config.measures_coherence:
        options, _, price = budget.choose(ways)
        kept = {
            way.name: {n: o[way.name].kept(price) for n, o in options.items() if way.name in o}
            for way in ways
        }
        ways = [
            replace(w, scores=scale_by_coherence(tokens, w.layers, w.scores, kept[w.name]))
            for w in ways
        ]
    return budget.allocate(ways)


@dataclass(frozen=True)
class TimeBudget:
    """Of the dense model's time at these ``prices`` a share, ``reduction``, is to be saved."""

    prices: Prices
    attentions: Sequence[AttentionPlan]
    reduction: float

    def choose(self, ways: Ways) -> tuple[Options, dict[str, str], float]:
        """The options of every layer, the one that is chosen, and the price of a second."""
        options = self._of_mlps(ways) | self._of_attentions()
        unread = [plan for plan in self.attentions if plan.modes is None]
        fixed = self.prices.rest + sum(map(self._whole, unread))
        seconds = (1 - self.reduction) * self.prices.whole - fixed
        numbers, price = choose_options([list(own.values()) for own in options.values()], seconds)
        pairs = zip(options.items(), numbers, strict=True)
        return options, {name: list(own)[number] for (name, own), number in pairs}, price

    def allocate(self, ways: Ways) -> tuple[list[LayerExperts], Sizes]:
        """Choose as :func:`allocate_in_time`, by the scores that there are."""
        options, chosen, price = self.choose(ways)
        converted = {(way.name, e.site.name): e for way in ways for e in way.layers}
        layers = {layer.site.name: layer for layer in ways[0].layers}
        for name in layers.keys() & chosen.keys():
            own = converted.get((chosen[name], name), replace(layers[name], statistics=None))
            reason = describe(options[name], chosen[name], price)
            layers[name] = replace(own, partition=replace(own.partition, reason=reason))
        neurons = {
            name: options[name][chosen[name]].kept(price)
            for name, e in layers.items()
            if e.converted
        }
        modes = {}
        for each in self.attentions:
            if each.modes:
                both = [options[f"{each.site.name}.{part}"][LOW_RANK] for part in PARTS]
                modes[each.site.name] = each.in_heads(*(part.kept(price) for part in both))
        return list(layers.values()), Sizes(neurons, None, modes)

    def _of_mlps(self, ways: Ways) -> Options:
        """Dense and by every way, of the layers that some way converts."""
        options: Options = {}
        for way in ways:
            for layer in (layer for layer in way.layers if layer.converted):
                name, tokens = layer.site.name, layer.tokens * layer.statistics.shares
                price = self.prices.ways[way.name][name]
                scores, each = way.scores_in(layer), price.each / layer.tokens
                candidates = Candidates(scores, tokens, each, parameters=0)
                own = options.setdefault(name, {DENSE: Option(self.prices.dense[name])})
                own[way.name] = Option(price.fixed, candidates)
        return options

    def _of_attentions(self) -> Options:
        """The parts of each, between which what it takes in any case is divided."""
        options: Options = {}
        for plan in (plan for plan in self.attentions if plan.modes):
            price = self.prices.ways[LOW_RANK][plan.site.name]
            for part, blocks in zip(PARTS, plan.candidates(), strict=True):
                dimensions = plan.site.heads * plan.site.head_dim / blocks.scores.shape[1]
                own = Option(price.fixed / 2, replace(blocks, macs=price.each * dimensions))
                options[f"{plan.site.name}.{part}"] = {LOW_RANK: own}
        return options

    def _whole(self, plan: AttentionPlan) -> float:
        """Seconds of an attention that keeps all dimensions."""
        price = self.prices.ways[LOW_RANK][plan.site.name]
        return price.fixed + price.each * 2 * plan.site.heads * plan.site.head_dim


def describe(options: Mapping[str, Option], chosen: str, price: float) -> str:
    """What the chosen one of a layer's options takes and loses, then the others."""
    told = []
    for name in sorted(options, key=lambda name: name != chosen):
        seconds, loss = options[name].at(price)
        lost = f" at a loss of {loss:.2g}" if options[name].candidates else ""
        told.append(f"{name} {1e3 * seconds:.3g} ms{lost}")
    return "; ".join(told).removeprefix(f"{DENSE} ")
