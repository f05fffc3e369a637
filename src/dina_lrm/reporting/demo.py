"""What the demo's report says: from figures and pictures to sections, every sentence computed."""

from dina_lrm.reporting import figures
from dina_lrm.reporting.demo_results import (
    DemoResults,
    JudgedPicture,
    best_of_group,
    millions,
    percent,
    percent_range,
    rank_correlation,
    setting_name,
    shown_settings,
    token_ensemble,
    worst_disagreement,
)
from dina_lrm.reporting.evaluation import reliability_curve
from dina_lrm.reporting.html import (
    Block,
    Fact,
    Facts,
    Gallery,
    Paragraph,
    Picture,
    Plot,
    Plots,
    Report,
    Section,
    Table,
)


def build_report(results: DemoResults) -> Report:
    """The whole report."""
    return Report(
        title="A reward that reads noisy latents",
        summary=(
            "A small text-to-image model drew coloured shapes. A reward that looks at its latents, with its "
            "own first blocks, was trained here from scratch on simulated votes, measured beside the shipped "
            "one, and put to rank new pictures. A judge that reads the pixels, which no model has seen, says "
            "who is right."
        ),
        facts=key_facts(results),
        sections=[
            samples_section(results),
            training_section(results),
            quality_section(results),
            ranking_section(results),
            disagreement_section(results),
            cost_section(results),
        ],
        footer=f"Made by dina-lrm demo. {results.environment}. Intervals: 95%, resampling prompts.",
    )


# --- sections ----------------------------------------------------------------------------------------------


def key_facts(results: DemoResults) -> list[Fact]:
    shipped, fresh = results.shipped.result.default, results.fresh.result.default
    mean, chosen, best = best_of_group(results.rankings)
    facts: list[Fact] = []
    for reward, setting in ((results.shipped, shipped), (results.fresh, fresh)):
        share = setting.expected_bayes_share
        value, interval = (
            (share, "of the best possible accuracy") if share else (setting.accuracy, "accuracy")
        )
        facts.append(
            Fact(
                value=percent(value.value),
                label=f"{interval}: the {reward.label} reward",
                note=f"{percent_range(value)} at σ = {setting.setting.label}",
            )
        )
    facts.append(
        Fact(
            value=f"{mean:.2f} → {chosen:.2f}",
            label=f"judged quality when the reward picks one of {len(results.rankings[0].pictures)}",
            note=f"the judge's own picks reach {best:.2f}",
        )
    )
    facts.append(
        Fact(
            value=f"{results.milliseconds_per_score:.0f} ms",
            label="to score one picture's latent",
            note="one noise level, on this machine",
        )
    )
    return facts


def samples_section(results: DemoResults) -> Section:
    pictures = [
        Picture(image=image, alternative=f"generated from: {caption}", lines=[caption])
        for caption, image in results.samples
    ]
    return Section(
        title="What the generator draws",
        blocks=[
            Paragraph(
                text="A Stable Diffusion 3 pipeline of a few million parameters, shipped with the package. "
                "Each picture was generated just now from the caption under it, at 64 by 64 pixels."
            ),
            Gallery(pictures=pictures, columns=6),
        ],
    )


def training_section(results: DemoResults) -> Section:
    fresh, curve = results.fresh, results.curve
    bayes = fresh.result.bayes
    ceiling = bayes.accuracy.value if bayes else None
    batches = figures.training_curve(curve.steps, curve.accuracy, ceiling=ceiling)
    held_out = figures.validation_curves(curve.validation_steps, curve.validation_accuracy, ceiling=ceiling)
    last = max((accuracy[-1] for accuracy in curve.validation_accuracy.values()), default=curve.accuracy[-1])
    facts = [
        Fact(value=f"{fresh.num_train_pairs or 0:,}", label="training pairs"),
        Fact(
            value=f"{curve.steps[-1]:,}",
            label="optimizer steps",
            note=f"in {fresh.train_seconds or 0:.0f} seconds",
        ),
        Fact(
            value=millions(fresh.trainable_parameters), label="trained parameters", note="adapters and head"
        ),
        Fact(value=percent(last), label="of held-out pairs ranked right at the end"),
    ]
    return Section(
        title="Training from scratch",
        blocks=[
            Paragraph(
                text="Each training step draws noise levels at random, adds the same noise to both pictures "
                "of a pair, and asks for the one that most raters preferred. Where the noise is strong a "
                "margin counts for less: the likelihood's variance grows with σ."
            ),
            Facts(facts=facts),
            Plots(
                plots=[
                    Plot(
                        svg=figures.themed_svg(batches, label="Accuracy of training batches"),
                        caption="Pairs ranked right in each training batch, at noise levels from all of (0, "
                        "1), and their running mean.",
                    ),
                    Plot(
                        svg=figures.themed_svg(
                            held_out, label="Accuracy of held-out pairs at each noise level"
                        ),
                        caption="Held-out pairs at fixed noise levels. Raters disagree with themselves, so "
                        "the dashed line and not 100% is the best that can be done.",
                    ),
                ]
            ),
        ],
    )


def quality_section(results: DemoResults) -> Section:
    rewards = (results.shipped, results.fresh)
    bayes = results.shipped.result.bayes
    accuracy = figures.accuracy_by_noise_level(
        [
            figures.AccuracyCurve(
                label=reward.label,
                noise_levels=[item.setting.noise_levels[0] for item in reward.result.sweep],
                accuracy=[item.accuracy for item in reward.result.sweep],
                ensemble=token_ensemble(reward.result).accuracy if token_ensemble(reward.result) else None,  # pyright: ignore[reportOptionalMemberAccess]
            )
            for reward in rewards
        ],
        bayes_accuracy=bayes.accuracy.value if bayes else None,
    )
    reliability = figures.reliability_diagram(
        [reliability_curve(reward.label, reward.result.default.reliability) for reward in rewards]
    )
    rows = [
        [
            reward.label,
            setting_name(item),
            percent(item.accuracy.value),
            percent_range(item.accuracy),
            percent(item.expected_bayes_share.value) if item.expected_bayes_share else "–",
            percent_range(item.expected_bayes_share) if item.expected_bayes_share else "–",
            percent(item.reliability.expected_calibration_error),
        ]
        for reward in rewards
        for item in shown_settings(reward.result)
    ]
    result = results.shipped.result
    best_possible = percent(bayes.accuracy.value) if bayes else ""
    return Section(
        title="How good they are",
        blocks=[
            Paragraph(text=verdict(results)),
            Plots(
                plots=[
                    Plot(
                        svg=figures.themed_svg(
                            accuracy, label="Accuracy at each noise level, for both rewards"
                        ),
                        caption="Accuracy at single noise levels, with 95% intervals; at the right, the "
                        "ensemble of several levels at once. Too little noise hides what the denoiser knows, "
                        "too much hides the picture.",
                    ),
                    Plot(
                        svg=figures.themed_svg(reliability, label="Stated against observed probability"),
                        caption="Calibration: of the pairs that a reward calls 80%, about 80 in 100 should "
                        "go that way. Larger points hold more pairs.",
                    ),
                ]
            ),
            Table(
                headers=[
                    "reward",
                    "noise level",
                    "accuracy",
                    "95% interval",
                    "of Bayes",
                    "95% interval",
                    "ECE",
                ],
                rows=rows,
                text_columns=2,
                caption=f"On {result.num_pairs:,} pairs of {result.num_prompts:,} captions drawn for it. "
                "ECE is the expected calibration error."
                + (f" The best possible accuracy on these votes is {best_possible}." if bayes else ""),
            ),
        ],
    )


def ranking_section(results: DemoResults) -> Section:
    mean, chosen, best = best_of_group(results.rankings)
    tau = rank_correlation(results.rankings)
    scatter = figures.agreement_scatter(
        [
            ([p.score for p in ranking.pictures], [p.utility for p in ranking.pictures])
            for ranking in results.rankings
        ]
    )
    utilities = [[picture.utility for picture in ranking.pictures] for ranking in results.rankings]
    by_rank = figures.utility_by_rank(utilities)
    galleries: list[Block] = [
        Gallery(
            caption=ranking.caption,
            ordered=True,
            columns=len(ranking.pictures),
            pictures=[
                Picture(
                    image=picture.image,
                    alternative=f"rank {rank} for: {ranking.caption}; reward {picture.score:+.2f}, "
                    f"judge {picture.utility:.2f}",
                    lines=[f"{picture.score:+.2f}", f"judge {picture.utility:.2f}", picture.made_with],
                    mark=str(rank),
                )
                for rank, picture in enumerate(ranking.pictures, start=1)
            ],
        )
        for ranking in results.rankings
    ]
    return Section(
        title="Best to worst",
        blocks=[
            Paragraph(
                text="New pictures of each caption, some made with few steps or weak guidance, in the "
                "shipped reward's order. Under each: the reward, the gold judge's utility between 0 and 1, "
                "how it was made."
            ),
            *galleries,
            Paragraph(
                text="Within a caption the reward's order and the judge's agree with a Kendall τ of "
                f"{tau:.2f} (1 is the same order, 0 is chance). Taking the reward's favourite raises the "
                f"judged utility from {mean:.2f} on average to {chosen:.2f}; the judge's own favourites have "
                f"{best:.2f}."
            ),
            Plots(
                plots=[
                    Plot(
                        svg=figures.themed_svg(scatter, label="The judge's utility against the reward"),
                        caption="Each point is a generated picture. Only differences within a caption carry "
                        "meaning, so each caption's mean reward is taken off.",
                    ),
                    Plot(
                        svg=figures.themed_svg(by_rank, label="Judged utility at each place of the ranking"),
                        caption="The judge's utility at each place, averaged over captions: in the reward's "
                        "order, and in the judge's own, which no reward can beat.",
                    ),
                ]
            ),
        ],
    )


def disagreement_section(results: DemoResults) -> Section:
    found = worst_disagreement(results.rankings)
    if found is None:
        text = "On these pictures the reward never prefers one that the judge finds worse."
        return Section(title="Where it is wrong", blocks=[Paragraph(text=text)])
    caption, preferred, better = found

    def show(picture: JudgedPicture, whose: str) -> Picture:
        matches = (
            "all of the caption is there" if picture.full_match else "something of the caption is missing"
        )
        return Picture(
            image=picture.image,
            alternative=f"{whose}: reward {picture.score:+.2f}, judge {picture.utility:.2f}",
            lines=[whose, f"reward {picture.score:+.2f}, judge {picture.utility:.2f}", matches],
        )

    return Section(
        title="Where it is wrong",
        blocks=[
            Paragraph(
                text=f"The worst disagreement above, for “{caption}”: the reward prefers the left picture, "
                "the judge the right one. A generator trained against this reward would learn to make more "
                "of the left."
            ),
            Gallery(
                pictures=[show(preferred, "the reward's choice"), show(better, "the judge's choice")],
                columns=4,
            ),
        ],
    )


def cost_section(results: DemoResults) -> Section:
    total = sum(seconds for _, seconds, _ in results.stages)
    rows = [[name, f"{seconds:.1f} s", amount] for name, seconds, amount in results.stages]
    rows.append(["all", f"{total:.1f} s", f"{results.peak_memory_bytes / 2**30:.2f} GiB of memory at most"])
    return Section(
        title="What it cost",
        blocks=[Table(headers=["stage", "time", "amount"], rows=rows, caption=results.environment)],
    )


# --- figures behind the words ------------------------------------------------------------------------------


def verdict(results: DemoResults) -> str:
    """The comparison in words, from the numbers."""
    shipped, fresh = results.shipped.result.default, results.fresh.result.default
    sentences = [
        f"The {reward.label} reward, at the noise level that suited it best on other pairs "
        f"(σ = {item.setting.label}), ranks {percent(item.accuracy.value)} of pairs right"
        + (
            f", {percent(item.expected_bayes_share.value)} of what is possible."
            if item.expected_bayes_share
            else "."
        )
        for reward, item in ((results.shipped, shipped), (results.fresh, fresh))
    ]
    result = results.shipped.result
    ensemble = token_ensemble(result)
    if ensemble is not None and result.sweep:
        single = max(result.sweep, key=lambda item: item.accuracy.value)
        difference = 100 * (ensemble.accuracy.value - single.accuracy.value)
        change = "changes nothing" if abs(difference) < 0.05 else f"{abs(difference):.1f} points"
        if abs(difference) >= 0.05:
            change = ("gains " if difference > 0 else "loses ") + change
        sentences.append(
            f"Reading several levels at once {change} against the best single level (σ = "
            f"{single.setting.label}) for {ensemble.setting.passes} times its cost."
        )
    return " ".join(sentences)
