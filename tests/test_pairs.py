"""The checks of preference pairs, and where completions and turns begin and end."""

import warnings

import pytest
from datasets import Dataset
from tiny import CHAT, tiny_tokenizer

from fastrlhf.data import PairRules, prepare_pairs
from fastrlhf.data.turns import parse_transcript

EOS = 1
TRANSCRIPT = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: the film\n\nAssistant:"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(CHAT, pad_is_eos=False)


def pairs(tokenizer, rows, max_length=256, rules=None, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return prepare_pairs(Dataset.from_list(rows), tokenizer, max_length, rules, **options)


def pair(chosen, rejected, **columns):
    return {"prompt": "the", "chosen": chosen, "rejected": rejected, **columns}


ROWS = [
    pair(" good", " bad", tie=False),
    pair(" bad", " good", tie=False),  # contradicts the first
    pair(" film", " film was", tie=True),
    pair(" film", "  ", tie=False),
    pair(" film", " film", tie=False),
    pair(" film", " bad" * 40, tie=False),
    pair(" film", " so so", tie=False),
]


class TestRules:
    def test_everything_is_counted_and_kept_by_choice(self, tokenizer):
        kept, report = pairs(tokenizer, ROWS, 40, PairRules(empty_completions="keep", too_long="drop"))
        found = {name: n for name, n in report.as_dict().items() if n}
        assert found == {
            **{"rows": 7, "kept": 5, "ties": 1, "contradictions": 2, "empty_completions": 1},
            **{"identical": 1, "too_long": 1},
        }
        assert len(kept) == 5

    def test_everything_is_dropped_by_choice(self, tokenizer):
        kept, report = pairs(tokenizer, ROWS, 40, PairRules("drop", "drop", "drop", "drop"))
        assert report.kept == len(kept) == 1
        assert tokenizer.decode(kept[0]["rejected_ids"]) == "the so so<|im_end|>"

    def test_one_warning_says_what_was_found(self, tokenizer):
        with pytest.warns(UserWarning, match="Pairs:") as caught:
            prepare_pairs(Dataset.from_list(ROWS[:4]), tokenizer, 64)
        (said,) = caught
        assert str(said.message) == (
            "Pairs: 1 ties, 2 with labels that contradict each other, 1 with an empty completion; 3 of 4 pairs kept."
        )

    def test_nothing_to_remark(self, tokenizer):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, report = prepare_pairs(Dataset.from_list(ROWS[:1]), tokenizer, 64)
        assert report.summary() == "nothing to remark; 1 of 1 pairs kept"

    def test_ties_by_ratings_and_by_margin(self, tokenizer):
        rated = [pair(" good", " bad", score_chosen=s, score_rejected=2.0) for s in (2.0, 3.5)]
        kept, report = pairs(tokenizer, rated)
        assert report.ties == 1
        assert kept["gap"][:] == [0.0, 1.5]
        assert pairs(tokenizer, [pair("a", "b", margin=0.0), pair("c", "d", margin=1.0)])[1].ties == 1

    def test_empty_turns_of_conversations(self, tokenizer):
        user, said, nothing = (
            {"role": role, "content": text}
            for role, text in (("user", "hi"), ("assistant", "hello"), ("assistant", ""))
        )
        rows = [{"chosen": [user, said], "rejected": [user, nothing]}, {"chosen": [user, said], "rejected": [user] * 2}]
        assert pairs(tokenizer, rows)[1].empty_completions == 1
        transcripts = [{"chosen": TRANSCRIPT + " a", "rejected": TRANSCRIPT + " "}]
        assert pairs(tokenizer, transcripts, rules=PairRules(empty_completions="keep"))[1].empty_completions == 1

    def test_nothing_left(self, tokenizer):
        with pytest.raises(ValueError, match=r"nothing is left to train on: 1 with an empty completion; 0 of 1"):
            pairs(tokenizer, ROWS[3:4])

    def test_too_long_is_an_error_that_names_the_way_out(self, tokenizer):
        with pytest.raises(ValueError, match=r"1 of 7 pairs .*first is row 5.*pair_too_long='drop'"):
            pairs(tokenizer, ROWS, 40)

    def test_choices(self):
        with pytest.raises(ValueError, match="pair_ties='error' must be one of keep, drop"):
            PairRules(ties="error")
        with pytest.raises(ValueError, match="pair_too_long='keep' must be one of error, drop"):
            PairRules(too_long="keep")


class TestStarts:
    def test_prompts_transcripts_and_conversations(self, tokenizer):
        user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "good"}
        worse = {"role": "assistant", "content": "bad"}
        for row in (
            pair(" good", " bad"),
            {"chosen": TRANSCRIPT + " good", "rejected": TRANSCRIPT + " bad"},
            {"chosen": [user, answer], "rejected": [user, worse]},
        ):
            kept, _ = pairs(tokenizer, [row], starts=True)
            for side, said in (("chosen", "good"), ("rejected", "bad")):
                completion = tokenizer.decode(kept[0][f"{side}_ids"][kept[0][f"{side}_start"] :])
                assert completion.strip() == f"{said}<|im_end|>"

    def test_plain_text_has_none(self, tokenizer):
        with pytest.raises(ValueError, match=r"row 0, column 'chosen'.*a transcript"):
            pairs(tokenizer, [{"chosen": "good", "rejected": "bad"}], starts=True)

    def test_other_prompts_are_no_pair(self, tokenizer):
        rows = [
            {"chosen": TRANSCRIPT + " good", "rejected": "\n\nHuman: so\n\nAssistant: bad"},
            {"chosen": TRANSCRIPT + " good", "rejected": TRANSCRIPT + " bad"},
        ]
        kept, report = pairs(tokenizer, rows, starts=True)
        assert (len(kept), report.different_prompts) == (1, 1)
        assert pairs(tokenizer, rows)[1].different_prompts == 0


class TestTurns:
    def test_transcripts(self, tokenizer):
        kept, _ = pairs(tokenizer, [{"chosen": TRANSCRIPT + " good", "rejected": TRANSCRIPT + " bad"}], turns=True)
        ids, ends = kept[0]["chosen_ids"], kept[0]["chosen_turns"]
        assert ends[-1] == len(ids) - 1
        assert tokenizer.decode(ids[: ends[0] + 1]) == "\n\nHuman: hi\n\nAssistant: hello"
        assert len(ends) == 2

    def test_conversations_end_at_the_templates_mark(self, tokenizer):
        said = [{"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "hello")) * 2]
        worse = [*said[:3], {"role": "assistant", "content": "bad"}]
        kept, _ = pairs(tokenizer, [{"chosen": said, "rejected": worse}], turns=True)
        ids, ends = kept[0]["chosen_ids"], kept[0]["chosen_turns"]
        assert [ids[end] for end in ends] == [EOS, EOS]
        assert ends == [i for i, token in enumerate(ids) if token == EOS][1::2]

    def test_with_a_prompt_whose_letters_would_merge(self, tokenizer):
        before = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: the fi"
        row = {"prompt": before, "chosen": "lm", "rejected": " bad"}
        ids, ends = (pairs(tokenizer, [row], turns=True)[0][0][f"chosen_{name}"] for name in ("ids", "turns"))
        assert tokenizer.decode(ids[: ends[0] + 1]) == "\n\nHuman: a\n\nAssistant: b"

    def test_plain_text_is_one_turn(self, tokenizer):
        kept, _ = pairs(tokenizer, ROWS[:1], turns=True)
        assert kept[0]["chosen_turns"] == [len(kept[0]["chosen_ids"]) - 1]

    def test_a_transcript_as_messages(self):
        assert parse_transcript(TRANSCRIPT + " good. \n") == [
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": "the film"},
            {"role": "assistant", "content": "good."},
        ]
        assert parse_transcript("no marks") == []


class TestObjectives:
    def test_columns_of_numbers(self, tokenizer):
        rows = [pair(" good", " bad", helpful=1, harmless=None), pair(" film", " bad", helpful=-2.0, harmless=1.0)]
        kept, _ = pairs(tokenizer, rows, objectives=["helpful", "harmless"])
        assert (kept["helpful"][:], kept["harmless"][:]) == ([1.0, -2.0], [0.0, 1.0])

    def test_missing(self, tokenizer):
        with pytest.raises(ValueError, match="also the objectives kind"):
            pairs(tokenizer, ROWS[:1], objectives=["kind"])
