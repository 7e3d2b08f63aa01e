"""Loading data sets, and the columns made of them for the three trainers."""

from __future__ import annotations

import gzip
import json
import shutil
import warnings

import datasets
import pytest
from datasets import Dataset, DatasetDict
from tiny import CHAT, MARKED_CHAT, tiny_tokenizer

from fastrlhf.data import load_data, prepare_preferences, prepare_prompts, prepare_sft

EOS = 1


@pytest.fixture(autouse=True)
def _quiet_and_apart(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def chat_tokenizer():
    return tiny_tokenizer(CHAT)


def rows(*items):
    return Dataset.from_list(list(items))


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def trained(tokenizer, row):
    return tokenizer.decode([label for label in row["labels"] if label != -100])


USER, ANSWER = {"role": "user", "content": "good film"}, {"role": "assistant", "content": "was bad"}
TRANSCRIPT = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: film?\n\nAssistant:"


class TestLoad:
    ROWS = ({"text": "good"}, {"text": "bad"})

    def write(self, path, opener=open):
        with opener(path, "wt") as file:
            if ".csv" in path.name:
                file.write("text\ngood\nbad\n")
            elif ".jsonl" in path.name:
                file.writelines(json.dumps(row) + "\n" for row in self.ROWS)
            else:
                json.dump(self.ROWS, file)
        return str(path)

    @pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
    def test_file(self, tmp_path, name):
        assert load_data(self.write(tmp_path / name))["text"][:] == ["good", "bad"]
        assert load_data(self.write(tmp_path / f"{name}.gz", gzip.open))["text"][:] == ["good", "bad"]

    def test_parquet(self, tmp_path):
        path = tmp_path / "a.parquet"
        rows(*self.ROWS).to_parquet(path)
        with open(path, "rb") as plain, gzip.open(f"{path}.gz", "wb") as zipped:
            shutil.copyfileobj(plain, zipped)
        assert load_data(str(path))[:] == load_data(f"{path}.gz")[:] == {"text": ["good", "bad"]}

    def test_a_file_is_the_split_asked_for(self, tmp_path):
        path = self.write(tmp_path / "a.jsonl")
        assert len(load_data(path, "test")) == 2
        assert load_data(path, "test[1:]")["text"][:] == ["bad"]

    def test_folder_of_files_split_by_name(self, tmp_path):
        self.write(tmp_path / "train.jsonl")
        self.write(tmp_path / "test.jsonl.gz", gzip.open)
        assert len(load_data(str(tmp_path), "test")) == 2
        with pytest.raises(ValueError, match=r"no split 'validation'.*train \(2 rows\), test \(2 rows\)"):
            load_data(str(tmp_path), "validation")

    def test_hh_rlhf_folders(self, tmp_path):
        for name in ("helpful-base", "harmless-base"):
            (tmp_path / name).mkdir()
            with gzip.open(tmp_path / name / "train.jsonl.gz", "wt") as file:
                file.write(json.dumps({"chosen": TRANSCRIPT + " good", "rejected": TRANSCRIPT + " bad"}) + "\n")
        assert load_data(str(tmp_path)).column_names == ["chosen", "rejected"]
        assert len(load_data(str(tmp_path))) == 2

    def test_saved_to_disk(self, tmp_path):
        DatasetDict({"train": rows(*self.ROWS), "dev": rows(self.ROWS[0])}).save_to_disk(tmp_path / "splits")
        rows(*self.ROWS).save_to_disk(tmp_path / "one")
        assert len(load_data(str(tmp_path / "splits"), "dev")) == 1
        assert len(load_data(str(tmp_path / "one"), "train[:1]")) == 1
        with pytest.raises(ValueError, match=r"no split 'dev'.*train \(2 rows\)"):
            load_data(str(tmp_path / "one"), "dev")

    def test_nothing_there(self, tmp_path, monkeypatch):
        with pytest.raises(FileNotFoundError, match=r"no such file or folder .*gone\.jsonl"):
            load_data(str(tmp_path / "gone.jsonl"))

        def unreachable(*_):
            raise ConnectionError("Couldn't reach the Hub")

        monkeypatch.setattr("fastrlhf.data.load.load_dataset", unreachable)
        with pytest.raises(FileNotFoundError, match=r"'who/what'.*no such file.*Couldn't reach the Hub.*local file"):
            load_data("who/what")

    def test_unreadable(self, tmp_path):
        (tmp_path / "empty.jsonl").touch()
        with pytest.raises(ValueError, match="empty"):
            load_data(str(tmp_path / "empty.jsonl"))
        (tmp_path / "bad.jsonl").write_text('{"text": "a"\n{{')
        with pytest.raises(ValueError, match=r"bad\.jsonl.*could not be read as \.jsonl"):
            load_data(str(tmp_path / "bad.jsonl"))
        (tmp_path / "a.docx").touch()
        with pytest.raises(ValueError, match=r"\.docx file, wanted \.jsonl"):
            load_data(str(tmp_path / "a.docx"))
        (tmp_path / "folder").mkdir()
        with pytest.raises(ValueError, match=r"folder.*could not be read.*train\.jsonl"):
            load_data(str(tmp_path / "folder"))
        with pytest.raises(ValueError, match="is empty"):
            load_data(self.write(tmp_path / "a.jsonl"), "train[:0]")


class TestSFT:
    def test_text_ends_with_one_eos_and_is_trained_whole(self, tokenizer):
        out = prepare_sft(rows({"text": "good film"}, {"text": "bad film<|im_end|>"}), tokenizer, 64)
        assert out.column_names == ["input_ids", "labels"]
        assert out[0]["input_ids"] == out[0]["labels"] == [*ids(tokenizer, "good film"), EOS]
        assert out[1]["input_ids"] == [*ids(tokenizer, "bad film"), EOS]

    def test_pairs_train_the_completion(self, tokenizer):
        data = rows({"prompt": "the film was", "completion": " good", "score": 3})
        row = prepare_sft(data, tokenizer, 64)[0]
        assert row["input_ids"] == [*ids(tokenizer, "the film was"), *ids(tokenizer, " good"), EOS]
        assert trained(tokenizer, row) == " good<|im_end|>"
        row = prepare_sft(data, tokenizer, 64, completion_only_loss=False)[0]
        assert row["labels"] == row["input_ids"]

    def test_the_prompt_keeps_its_own_tokens_where_letters_would_merge(self, tokenizer):
        assert ids(tokenizer, "the fi") + ids(tokenizer, "lm") != ids(tokenizer, "the film")
        row = prepare_sft(rows({"prompt": "the fi", "completion": "lm"}), tokenizer, 64)[0]
        assert row["input_ids"] == [*ids(tokenizer, "the fi"), *ids(tokenizer, "lm"), EOS]
        assert trained(tokenizer, row) == "lm<|im_end|>"

    def test_bos_once_and_not_in_chats(self):
        tokenizer = tiny_tokenizer(CHAT, bos=True)
        row = prepare_sft(rows({"prompt": "the", "completion": " film"}), tokenizer, 64)[0]
        assert row["input_ids"] == [0, *ids(tokenizer, "the"), *ids(tokenizer, " film"), EOS]
        assert trained(tokenizer, row) == " film<|im_end|>"
        assert prepare_sft(rows({"text": "<|im_start|>the"}), tokenizer, 64)[0]["input_ids"].count(0) == 1
        assert prepare_sft(rows({"messages": [USER, ANSWER]}), tokenizer, 64)[0]["input_ids"].count(0) == 2

    def test_messages_train_every_marked_turn(self):
        tokenizer = tiny_tokenizer(MARKED_CHAT)
        row = prepare_sft(rows({"messages": [USER, ANSWER, USER, ANSWER]}), tokenizer, 99)[0]
        assert trained(tokenizer, row) == "was bad<|im_end|>" * 2
        assert row["input_ids"][-1] == EOS

    def test_messages_train_the_last_turn_without_marks(self, chat_tokenizer):
        row = prepare_sft(rows({"messages": [USER, ANSWER, USER, ANSWER, USER]}), chat_tokenizer, 99)[0]
        assert trained(chat_tokenizer, row) == "was bad<|im_end|>"
        assert chat_tokenizer.decode(row["input_ids"]).count("<|im_start|>") == 4

    def test_pairs_of_messages(self, chat_tokenizer):
        row = prepare_sft(rows({"prompt": [USER], "completion": [ANSWER]}), chat_tokenizer, 64)[0]
        assert row == prepare_sft(rows({"messages": [USER, ANSWER]}), chat_tokenizer, 64)[0]

    def test_chosen_answers(self, tokenizer, chat_tokenizer):
        row = prepare_sft(rows({"chosen": TRANSCRIPT + " good", "rejected": "x"}), tokenizer, 99)[0]
        assert trained(tokenizer, row) == " good<|im_end|>"
        data = rows({"prompt": "good film", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]})
        row = prepare_sft(data, chat_tokenizer, 99)[0]
        assert row == prepare_sft(rows({"messages": [USER, ANSWER]}), chat_tokenizer, 99)[0]

    def test_what_is_too_long_loses_its_end(self, tokenizer):
        data = rows({"prompt": "the film was good", "completion": " good"}, {"prompt": "a", "completion": " good film"})
        with pytest.warns(UserWarning, match=r"1 of 2 rows have no token to train within max_length=3") as caught:
            out = prepare_sft(data, tokenizer, 3)
        assert len(caught) == 1
        assert [len(row["input_ids"]) for row in out] == [3]
        with pytest.raises(ValueError, match="nothing is left"):
            prepare_sft(data, tokenizer, 1)

    def test_errors(self, tokenizer):
        with pytest.raises(ValueError, match="columns prompt, answer; wanted `messages`"):
            prepare_sft(rows({"prompt": "a", "answer": "b"}), tokenizer, 8)
        with pytest.raises(ValueError, match="row 1, column 'text': NoneType None given, wanted a string"):
            prepare_sft(rows({"text": "a"}, {"text": None}), tokenizer, 8)
        with pytest.raises(ValueError, match="empty"):
            prepare_sft(Dataset.from_dict({"text": []}), tokenizer, 8)
        with pytest.raises(ValueError, match="Dataset is wanted, DatasetDict given"):
            prepare_sft(DatasetDict(), tokenizer, 8)
        with pytest.raises(ValueError, match="no chat template"):
            prepare_sft(rows({"messages": [USER, ANSWER]}), tokenizer, 8)

    def test_errors_in_conversations(self, chat_tokenizer):
        with pytest.raises(ValueError, match=r"row 0, column 'messages': no assistant turn .*roles: user"):
            prepare_sft(rows({"messages": [USER]}), chat_tokenizer, 8)
        with pytest.raises(ValueError, match=r"row 0, column 'messages'.*list of messages"):
            prepare_sft(rows({"messages": [{"from": "human", "value": "x"}]}), chat_tokenizer, 8)
        refusing = tiny_tokenizer("{{ raise_exception('only users') }}")
        with pytest.raises(ValueError, match=r"row 0.*only users"):
            prepare_sft(rows({"messages": [USER, ANSWER]}), refusing, 8)
        changing = tiny_tokenizer("{{ messages | length }}")
        with pytest.raises(ValueError, match=r"row 0.*where the completion begins"):
            prepare_sft(rows({"messages": [USER, ANSWER]}), changing, 8)

    def test_the_pad_token_plays_no_part(self, chat_tokenizer):
        data = rows({"messages": [USER, ANSWER]})
        other = tiny_tokenizer(CHAT, pad_is_eos=False)
        assert prepare_sft(data, chat_tokenizer, 64)[:] == prepare_sft(data, other, 64)[:]

    def test_no_eos(self):
        tokenizer = tiny_tokenizer()
        tokenizer.eos_token = None
        with pytest.raises(ValueError, match=r"no EOS token.*tokenizer\.eos_token"):
            prepare_sft(rows({"text": "a"}), tokenizer, 8)


class TestPreferences:
    def test_hh_rlhf_as_it_is(self, tokenizer):
        out = prepare_preferences(
            rows({"chosen": TRANSCRIPT + " good", "rejected": TRANSCRIPT + " bad"}), tokenizer, 99
        )
        assert out.column_names == ["chosen_ids", "rejected_ids"]
        assert out[0]["chosen_ids"] == [*ids(tokenizer, TRANSCRIPT + " good"), EOS]

    def test_prompt_goes_first_and_margin_stays(self, tokenizer):
        data = rows({"prompt": "the fi", "chosen": "lm", "rejected": " bad", "margin": 2, "id": 5})
        out = prepare_preferences(data, tokenizer, 64)
        assert set(out.column_names) == {"chosen_ids", "rejected_ids", "margin"}
        assert out[0]["margin"] == 2.0
        assert out[0]["chosen_ids"] == [*ids(tokenizer, "the fi"), *ids(tokenizer, "lm"), EOS]

    def test_conversations_end_at_eos(self, chat_tokenizer):
        worse = {"role": "assistant", "content": "bad"}
        data = rows({"prompt": [USER], "chosen": [ANSWER], "rejected": [worse]})
        want = ids(chat_tokenizer, chat_tokenizer.apply_chat_template([USER, ANSWER], tokenize=False).rstrip("\n"))
        assert prepare_preferences(data, chat_tokenizer, 64)[0]["chosen_ids"] == want
        assert want[-1] == EOS
        whole = rows({"chosen": [USER, ANSWER], "rejected": [USER, worse]})
        repeated = rows({"prompt": USER["content"], "chosen": [USER, ANSWER], "rejected": [USER, worse]})
        assert prepare_preferences(whole, chat_tokenizer, 64)[0]["chosen_ids"] == want
        assert prepare_preferences(repeated, chat_tokenizer, 64)[0]["chosen_ids"] == want

    def test_equal_sides_are_dropped_with_one_warning(self, tokenizer):
        data = rows({"chosen": "good", "rejected": "good<|im_end|>"}, {"chosen": "good", "rejected": "bad"})
        with pytest.warns(UserWarning, match="1 with the same tokens in chosen and rejected; 1 of 2 pairs") as caught:
            assert len(prepare_preferences(data, tokenizer, 64)) == 1
        assert len(caught) == 1
        with pytest.raises(ValueError, match="nothing is left"):
            prepare_preferences(data.select([0]), tokenizer, 64)

    def test_errors(self, tokenizer):
        data = rows({"chosen": "a", "rejected": "b"}, {"chosen": "good film", "rejected": "the bad bad film"})
        with pytest.raises(ValueError, match=r"1 of 2 pairs .*max_length=4 .*first is row 1, the longest has 5.*raise"):
            prepare_preferences(data, tokenizer, 4)
        with pytest.raises(ValueError, match="columns text; wanted `chosen`"):
            prepare_preferences(rows({"text": "a"}), tokenizer, 8)
        with pytest.raises(ValueError, match="row 0, column 'rejected': int 3 given"):
            prepare_preferences(rows({"chosen": "a", "rejected": 3}), tokenizer, 8)
        with pytest.raises(ValueError, match=r"row 0, column 'margin'.*a finite number"):
            prepare_preferences(rows({"chosen": "a", "rejected": "b", "margin": "much"}), tokenizer, 8)
        with pytest.raises(ValueError, match="empty"):
            prepare_preferences(Dataset.from_dict({"chosen": [], "rejected": []}), tokenizer, 8)


class TestPrompts:
    def test_all_columns_stay(self, tokenizer):
        out = prepare_prompts(rows({"prompt": "the film", "answer": 3}), tokenizer, 8)
        assert out[0] == {"prompt": "the film", "answer": 3, "prompt_ids": ids(tokenizer, "the film")}

    def test_messages_get_the_assistants_header(self, chat_tokenizer):
        row = prepare_prompts(rows({"prompt": [USER]}), chat_tokenizer, 64)[0]
        assert chat_tokenizer.decode(row["prompt_ids"]).endswith("<|im_start|>assistant\n")
        assert row["prompt"] == [USER]

    def test_prompts_out_of_conversations(self, tokenizer, chat_tokenizer):
        row = prepare_prompts(rows({"chosen": TRANSCRIPT + " good", "rejected": "x"}), tokenizer, 99)[0]
        assert row["prompt"] == TRANSCRIPT
        assert row["prompt_ids"] == ids(tokenizer, TRANSCRIPT)
        row = prepare_prompts(rows({"messages": [USER, ANSWER]}), chat_tokenizer, 99)[0]
        assert row["prompt"] == [USER]
        assert row["prompt_ids"] == prepare_prompts(rows({"prompt": [USER]}), chat_tokenizer, 99)[0]["prompt_ids"]

    def test_are_the_beginning_of_what_sft_and_the_reward_model_see(self, chat_tokenizer):
        tokenizer = tiny_tokenizer(CHAT, bos=True)
        for tok, prompt, answer in ((tokenizer, "the fi", "lm"), (chat_tokenizer, [USER], [ANSWER])):
            start = prepare_prompts(rows({"prompt": prompt}), tok, 64)[0]["prompt_ids"]
            sft = prepare_sft(rows({"prompt": prompt, "completion": answer}), tok, 64)[0]["input_ids"]
            pair = rows({"prompt": prompt, "chosen": answer, "rejected": answer * 2})
            assert sft[: len(start)] == start
            assert prepare_preferences(pair, tok, 64)[0]["chosen_ids"] == sft

    def test_errors(self, tokenizer):
        with pytest.raises(ValueError, match=r"row 1 has a prompt of 4 tokens.*max_prompt_length=3 \(1 of 2.*filter"):
            prepare_prompts(rows({"prompt": "a"}, {"prompt": "the film was bad"}), tokenizer, 3)
        with pytest.raises(ValueError, match="row 1 has an empty prompt"):
            prepare_prompts(rows({"prompt": "a"}, {"prompt": ""}), tokenizer, 3)
        with pytest.raises(ValueError, match="columns text; wanted `prompt`"):
            prepare_prompts(rows({"text": "a"}), tokenizer, 3)
        with pytest.raises(ValueError, match=r"row 0, column 'chosen'.*Assistant"):
            prepare_prompts(rows({"chosen": "no turns"}), tokenizer, 3)


def test_same_in_same_out(tokenizer):
    data = rows(*({"prompt": "the film " * (i % 3 + 1), "completion": "was good"} for i in range(50)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prepare_sft(data, tokenizer, 64)[:] == prepare_sft(data, tokenizer, 64)[:]
