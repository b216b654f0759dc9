"""Templates and background words: validation, the built-in lists, encoding (CA-CL, eq. 3 and 8)."""

from __future__ import annotations

import json
import re

import pytest
import torch

from cacl import DEFAULT_TEMPLATES, BackgroundSet, PromptSet

# Templates


def test_default_templates_are_the_paper_s():
    assert tuple(PromptSet()) == DEFAULT_TEMPLATES
    assert DEFAULT_TEMPLATES == ("a photo of {}.", "an image of {}.", "a picture of {}.", "a snapshot of {}.")


def test_texts():
    assert PromptSet(["a photo of {}.", "{} outside"]).texts("cat") == ["a photo of cat.", "cat outside"]
    assert PromptSet(["a {}"]).texts("{0}") == ["a {0}"]


def test_prompt_set_is_a_sequence():
    prompts = PromptSet()
    assert len(prompts) == 4
    assert prompts[-1] == DEFAULT_TEMPLATES[-1]
    assert prompts[1:3] == PromptSet(DEFAULT_TEMPLATES[1:3])
    assert prompts != PromptSet(DEFAULT_TEMPLATES[::-1])
    assert hash(prompts) == hash(PromptSet(list(DEFAULT_TEMPLATES)))
    assert repr(prompts[:1]) == "PromptSet(['a photo of {}.'])"


@pytest.mark.parametrize(
    ("templates", "kind", "text"),
    [
        ([], ValueError, "Expected `templates` to have at least one entry, but it is empty."),
        ("a {}", TypeError, "Expected `templates` to be a list of strings, but got 'a {}'."),
        (None, TypeError, "Expected `templates` to be a list of strings, but got None."),
        ([3], TypeError, "Expected `templates` to be a list of strings, but it has 3."),
        ([" "], ValueError, "Expected `templates` to have no empty entry, but it has ' '."),
        (["a {}", "A {}"], ValueError, "Expected `templates` to have no duplicates, but 'A {}' stands twice."),
        (["a photo"], ValueError, "Expected each of `templates` to have exactly one {}, but got 'a photo'."),
        (["{} and {}"], ValueError, "Expected each of `templates` to have exactly one {}, but got '{} and {}'."),
        (["{0}"], ValueError, "Expected each of `templates` to have exactly one {}, but got '{0}'."),
        (["{} {"], ValueError, "Expected each of `templates` to have exactly one {}, but got '{} {'."),
    ],
)
def test_templates_are_checked(templates, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        PromptSet(templates)


def test_encode(encoder):
    prompts, names = PromptSet(), ["cat", "dog", "dining table"]
    features = prompts.encode(encoder, names)
    assert features.shape == (3, 4, 32)
    assert features.dtype == torch.float32
    assert not features.requires_grad
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(3, 4))
    one = encoder.encode_text(["a picture of dog."])[0]
    torch.testing.assert_close(features[1, 2], one / one.norm())


def test_encode_in_small_batches_and_half_precision(encoder):
    names = ["cat", "dog", "bird"]
    wanted = PromptSet().encode(encoder, names)
    sizes, encode_text = [], encoder.encode_text
    encoder.encode_text = lambda texts: sizes.append(len(texts)) or encode_text(texts).half()
    features = PromptSet().encode(encoder, names, batch_size=5)
    assert sizes == [5, 5, 2]
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, wanted, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("names", "kind", "text"),
    [
        ("cat", TypeError, "Expected `names` to be a list of strings, but got 'cat'."),
        ([], ValueError, "Expected `names` to have at least one entry, but it is empty."),
        (["cat", "cat"], ValueError, "Expected `names` to have no duplicates, but 'cat' stands twice."),
    ],
)
def test_names_are_checked(encoder, names, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        PromptSet().encode(encoder, names)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_is_checked(encoder, batch_size):
    with pytest.raises(ValueError, match="Expected argument `batch_size` to be a positive integer"):
        PromptSet().encode(encoder, ["cat"], batch_size=batch_size)


def test_an_encoder_that_returns_another_shape(encoder):
    encoder.encode_text = lambda texts: torch.ones(len(texts) + 1, 32)
    text = "Expected `encoder.encode_text` to return (4, D) for 4 texts, but got shape (5, 32)."
    with pytest.raises(ValueError, match=re.escape(text)):
        PromptSet().encode(encoder, ["cat"])


# Background words


def test_background_set_is_a_mapping():
    backgrounds = BackgroundSet({"dining table": ["floor", "wall"], "boat": ["water"]})
    assert list(backgrounds) == ["dining table", "boat"]
    assert backgrounds["Dining-Table"] == backgrounds["diningtable"] == backgrounds["dining_table"] == ("floor", "wall")
    assert "BOAT" in backgrounds
    assert "cat" not in backgrounds
    assert 3 not in backgrounds
    assert len(backgrounds) == 2
    assert repr(backgrounds) == "BackgroundSet(2 classes)"


def test_background_texts():
    texts = BackgroundSet({"boat": ["water", "pier"]}).texts("boat", PromptSet(["a {}", "the {}"]))
    assert texts == ["a water", "the water", "a pier", "the pier"]


@pytest.mark.parametrize(
    ("words", "kind", "text"),
    [
        (["water"], TypeError, "Expected argument `words` to be a mapping, but got list."),
        ({}, ValueError, "Expected argument `words` to be a mapping with at least one class, but got an empty one."),
        ({"boat": []}, ValueError, "Expected `words['boat']` to have at least one entry, but it is empty."),
        ({"boat": "sea"}, TypeError, "Expected `words['boat']` to be a list of strings, but got 'sea'."),
        ({"boat": ["sea", 1]}, TypeError, "Expected `words['boat']` to be a list of strings, but it has 1."),
        (
            {"boat": ["sea", "Sea"]},
            ValueError,
            "Expected `words['boat']` to have no duplicates, but 'Sea' stands twice.",
        ),
        (
            {"boat": ["sea"], "cat": ["Boat"]},
            ValueError,
            "Background word 'Boat' of class 'cat' is the class 'boat': it would suppress that class.",
        ),
        (
            {"tv": ["tv"]},
            ValueError,
            "Background word 'tv' of class 'tv' is the class 'tv': it would suppress that class.",
        ),
        ({"dining table": ["floor"], "diningtable": ["wall"]}, ValueError, "diningtable"),
    ],
)
def test_background_words_are_checked(words, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        BackgroundSet(words)


def test_unknown_class():
    backgrounds = BackgroundSet({"boat": ["water"]})
    with pytest.raises(KeyError, match=r"no background words for class .*boot.*; did you mean .*boat"):
        backgrounds["boot"]
    with pytest.raises(KeyError, match="no background words for class 'cat'"):
        backgrounds.texts("cat", PromptSet())
    assert backgrounds.get("boot") is None


def test_encode_pads_shorter_lists_with_zeros(encoder):
    backgrounds = BackgroundSet({"boat": ["water", "pier", "sky"], "cat": ["sky"], "dog": ["lawn"]})
    prompts = PromptSet(["a {}", "the {}"])
    features = backgrounds.encode(encoder, ["cat", "boat"], prompts)
    assert features.shape == (2, 6, 32)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features[1].norm(dim=-1), torch.ones(6))
    assert torch.equal(features[0, :2], features[1, 4:])  # "sky" under both templates
    assert not features[0, 2:].any()


def test_encode_refuses_an_unknown_class(encoder):
    with pytest.raises(ValueError, match=re.escape("no background words for class 'boot'; did you mean \"boat\"?")):
        BackgroundSet({"boat": ["water"]}).encode(encoder, ["boot"], PromptSet())


# The built-in lists

VOC = """aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike, person,
pottedplant, sheep, sofa, train, tvmonitor"""
COCO = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, parking
meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie,
suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis
racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog,
pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell
phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush
"""
SYNONYMS = """
aeroplane airplane plane aircraft jet jetliner biplane airliner
bicycle bike cycle cyclist
bird pigeon gull seagull duck goose parrot swan chicken crow
boat ship sailboat vessel canoe kayak ferry yacht rowboat
bottle flask thermos
bus coach minibus
car automobile sedan taxi van suv vehicle
cat kitten kitty
chair armchair stool seat
cow cattle bull calf ox
diningtable table desk
dog puppy hound
horse pony foal mare
motorbike motorcycle scooter moped
person man woman people child boy girl human kid baby rider crowd pedestrian player skier surfer passenger audience
pottedplant plant houseplant flowerpot shrub
sheep lamb ram ewe
sofa couch settee loveseat
train locomotive tram railcar subway
tvmonitor tv television screen monitor
truck lorry pickup
trafficlight stoplight trafficsignal
firehydrant hydrant
stopsign roadsign
parkingmeter meter
bench pew
elephant calf
bear cub grizzly
zebra
giraffe
backpack rucksack knapsack
umbrella parasol
handbag purse bag
tie necktie bowtie
suitcase luggage briefcase
frisbee disc
skis ski
snowboard
sportsball ball football basketball baseball
kite
baseballbat bat
baseballglove glove mitt
skateboard longboard
surfboard
tennisracket racket racquet
wineglass glass goblet
cup mug teacup
fork
knife blade
spoon ladle
bowl
banana
apple
sandwich burger hamburger
orange tangerine mandarin
broccoli
carrot
hotdog sausage
pizza
donut doughnut
cake cupcake
bed mattress bunk
toilet
laptop notebook computer
mouse
remote remotecontrol
keyboard
cellphone phone smartphone mobile
microwave
oven stove range
toaster
sink washbasin basin
refrigerator fridge freezer
book textbook
clock watch
vase urn
scissors shears
teddybear teddy
hairdrier hairdryer
toothbrush
"""


def squeeze(text: str) -> str:
    return re.sub(r"[\s_-]", "", text).lower()


def singular(word: str) -> set[str]:
    forms = {word}
    if word.endswith("s"):
        forms.add(word[:-1])
    if word.endswith("es"):
        forms.add(word[:-2])
    return forms


@pytest.mark.parametrize(("name", "listed"), [("voc", VOC), ("coco", COCO)])
def test_built_in_words_are_never_a_class_or_its_synonym(name, listed):
    names = [name.strip() for name in listed.replace("\n", " ").split(",")]
    backgrounds = getattr(BackgroundSet, name)(7)
    groups = [set(line.split()) for line in SYNONYMS.strip().splitlines()]
    taken = {squeeze(name) for name in names}
    for group in groups:
        if group & taken:
            taken = taken | group
    assert {squeeze(name) for name in backgrounds} == {squeeze(name) for name in names}
    for name, words in backgrounds.items():
        assert len(set(map(squeeze, words))) == 7, name
        for word in words:
            # the phrase and its head noun: a "street bench" is a bench, a "bird bath" is no bird
            forms = singular(squeeze(word)) | singular(squeeze(word.split()[-1]))
            assert not forms & taken, (name, word, forms & taken)


@pytest.mark.parametrize(("name", "classes"), [("voc", 20), ("coco", 80)])
def test_built_in_lists_of_n_words(name, classes):
    built_in = getattr(BackgroundSet, name)
    all_words = built_in(7)
    for n in range(1, 8):
        backgrounds = built_in(n)
        assert len(backgrounds) == classes
        assert all(words == all_words[key][:n] for key, words in backgrounds.items())
    assert dict(built_in()) == dict(built_in(5))


@pytest.mark.parametrize("n", [0, -1, 8, 2.5, True, "5"])
def test_n_is_checked(n):
    with pytest.raises(ValueError, match=re.escape("Expected argument `n` to be ") + ".*but got"):
        BackgroundSet.voc(n)


def test_built_in_finds_the_list_that_knows_all_names():
    assert dict(BackgroundSet.built_in(["tvmonitor", "sofa"])) == dict(BackgroundSet.voc())
    assert dict(BackgroundSet.built_in(["tv", "giraffe"], n=3)) == dict(BackgroundSet.coco(3))
    with pytest.raises(ValueError, match="There are no built-in background words for 'unicorn'"):
        BackgroundSet.built_in(["cat", "unicorn"])


def test_built_in_takes_each_class_s_words_from_the_list_that_has_it():
    words = BackgroundSet.built_in(["TV-Monitor", "truck", "cat"])
    assert dict(words) == {
        "TV-Monitor": BackgroundSet.voc()["tv monitor"],
        "truck": BackgroundSet.coco()["truck"],
        "cat": BackgroundSet.coco()["cat"],
    }
    assert len(BackgroundSet.built_in(["sofa", "giraffe"], n=7)["sofa"]) == 7


def test_built_in_words_of_two_lists_are_none_of_the_classes():
    assert "keyboard" in BackgroundSet.voc(5)["tv monitor"]
    words = BackgroundSet.built_in(["tvmonitor", "keyboard", "truck"])
    assert words["tvmonitor"] == tuple(word for word in BackgroundSet.voc(6)["tv monitor"] if word != "keyboard")
    every = {_squeezed: name for name in (*BackgroundSet.voc(), *BackgroundSet.coco()) for _squeezed in [squeeze(name)]}
    words = BackgroundSet.built_in(list(every.values()))
    assert len(words) == 84
    assert all(len(list_) == 5 and not {squeeze(word) for word in list_} & set(every) for list_ in words.values())


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["cat", "Trucks"], "words for 'Trucks'; did you mean \"truck\"? Or give `backgrounds`"),
        (["tv monitor", "unicorn", "truck", "griffin"], "words for 'unicorn' and 1 more: give `backgrounds`"),
    ],
)
def test_built_in_names_the_class_that_no_list_has(names, text):
    with pytest.raises(ValueError, match=re.escape(f"There are no built-in background {text}")):
        BackgroundSet.built_in(names)


# Files


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "words.json"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_from_json(written):
    words = {"boat": ["water", "pier", "sky"], "Käfer": ["leaf", "bark", "moss"]}
    path = written(json.dumps(words, ensure_ascii=False))
    assert dict(BackgroundSet.from_json(path)) == {name: tuple(list_) for name, list_ in words.items()}
    assert BackgroundSet.from_json(str(path), n=2)["boat"] == ("water", "pier")
    with pytest.raises(ValueError, match=r"`n` to be at most 3, the number of words for 'boat' in .*words\.json"):
        BackgroundSet.from_json(path, n=4)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("boat: water", "expected a JSON object of words a class, but Expecting value"),
        ("", "expected a JSON object of words a class, but Expecting value"),
        ('{"boat": ["a"], "boat": ["b"]}', "'boat' stands twice"),
        ('["water"]', "expected a JSON object that maps each class to a list of words."),
        ('{"boat": "water"}', "expected a JSON object that maps each class to a list of words."),
        ('{"boat": ["water", 3]}', "`words['boat']` to be a list of strings, but it has 3."),
        ('{"boat": ["water", "water"]}', "`words['boat']` to have no duplicates, but 'water' stands twice."),
    ],
)
def test_from_json_names_the_file_and_the_fault(written, content, text):
    path = written(content)
    with pytest.raises(ValueError, match=re.escape(text)) as error:
        BackgroundSet.from_json(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_from_json_without_a_file(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.json: .*No such file"):
        BackgroundSet.from_json(tmp_path / "absent.json")


def test_from_json_that_is_not_utf8(tmp_path):
    (tmp_path / "words.json").write_bytes(b'{"boat": ["\xff"]}')
    with pytest.raises(ValueError, match=r"words\.json: expected a JSON object of words a class, but .*utf-8"):
        BackgroundSet.from_json(tmp_path / "words.json")


# What to ask a language model, and its answers


def test_query_names_the_class_and_the_number():
    query = BackgroundSet.query("hot dog", 7)
    assert "hot dog" in query
    assert "7" in query


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("water\npier\nsea foam", ("water", "pier", "sea foam")),
        ("1. Water\n2. Pier\n10. Sky", ("water", "pier", "sky")),
        ("1) water\n2: pier", ("water", "pier")),
        ("(1) water\n(2) pier", ("water", "pier")),
        ("- water\n* pier\n• sky", ("water", "pier", "sky")),
        ("– water\n– pier", ("water", "pier")),
        ("  - \"water\"\n  - 'pier'\n - “sky”", ("water", "pier", "sky")),
        ("water, pier; sky.", ("water", "pier", "sky")),
        ("water, pier, and sky", ("water", "pier", "sky")),
        ('["water", "pier"]', ("water", "pier")),
        ("Here are some words:\n\n1. **Water**\n2. `pier`\n", ("water", "pier")),
        ("water\nWater\npier", ("water", "pier")),
        ("2 story house", ("2 story house",)),
        ("sandbank", ("sandbank",)),
    ],
)
def test_parse(answer, words):
    assert BackgroundSet.parse(answer) == words


THREE = ("water", "pier", "sky")
ANSWERS = {
    "JSON in a fence": '```json\n["water", "pier", "sky"]\n```',
    "a fence between sentences": "Sure! Here you go:\n\n```text\nwater\npier\nsky\n```\n\nShall I go on?",
    "code in a fence": '```python\nwords = ["water", "pier", "sky"]\n```',
    "a fence that does not end": "```\nwater\npier\nsky",
    "a table": "| # | word |\n|---|---|\n| 1 | water |\n| 2 | pier |\n| 3 | sky |",
    "a table with reasons": "| Word | Why |\n|:--|--:|\n| **Water** | it floats |\n| Pier | at it |\n| Sky | blue |",
    "a table without a frame": "# | object\n--- | ---\n1 | water\n2 | pier\n3 | sky",
    "tabs": "1\twater\tbelow\n2\tpier\tit lies there\n3\tsky\tabove it",
    "a thought": "<think>\nboats are on water, so\n</think>\nwater\npier\nsky",
    "a thought whose beginning is cut off": "boats are on water, so\n</think>\nwater, pier, sky",
    "a thought with code": '<reasoning>\n```\nroad\n```\n</reasoning>\n```json\n["water", "pier", "sky"]\n```',
    "explanations after dashes": "1. water - what it floats on\n2. pier – where it lies\n3. sky — above it",
    "explanations after colons": "1. **Water:** what it floats on\n2. **Pier**: often, where it is\n3. Sky: over it",
    "explanations in brackets": "1. water (lakes, rivers)\n2. pier (where it lies)\n3. sky (above it)",
    "ideographic commas": "water、pier、sky。",
    "wide commas": "water，pier；sky",
    "wide numbers": "１．water\n２．pier\n３．sky",
    "numbers in circles": "① water\n② pier\n③ sky",
    "corner brackets": "「water」「pier」、「sky」",
    "an object": '{"boat": ["water", "pier", "sky"]}',
    "an object with more": '{"background": ["water", "pier", "sky"], "count": 3}',
    "a list of objects": '[{"word": "water", "why": "x"}, {"word": "pier"}, {"word": "sky"}]',
    "a list over lines": 'Sure:\n[\n  "water",\n  "pier",\n  "sky"\n]',
    "sentences around": "Here are 3 words.\n\n- water\n- pier\n- sky\n\nThese are the most frequent ones.",
    "a note": "water\npier\nsky\n\nNote: these are ordered by frequency.",
    "one sentence": "Here are three words: water, pier and sky.",
    "Windows": "1. water\r\n2. pier\r\n3. sky\r\n",
    "HTML": "<ul><li>water</li><li>pier&nbsp;</li><li>&quot;sky&quot;</li></ul>",
    "bold numbers": "**1.** water\n**2.** pier\n**3. Sky**",
    "a heading": "# Background words for a boat\n- [ ] water\n- [x] pier\n- sky",
    "YAML": "background:\n  - water\n  - pier\n  - sky",
    "bullets in a line": "• water • pier • sky",
    "numbers in a line": "1. water 2. pier 3. sky",
    "signs that are not seen": "\ufeffwater\n\u200bpier\n🌊 sky",
    "and so on": "water, pier, sky, etc.",
    "numbers before ideographic commas": "1、water\n2、pier\n3、sky",
    "all in one line of such": "一、water；二、pier；三、sky。",
    "numbers and nothing else": "1 water\n2 pier\n3 sky",
    "numbers with a hash": "#1 water\n#2 pier\n#3 sky",
    "numbers in brackets in a line": "(1) water (2) pier (3) sky",
    "bracketed numbers of one letter": "⑴ water ⑵ pier ⑶ sky",
    "keys": "1\ufe0f\u20e3 water\n2\ufe0f\u20e3 pier\n3\ufe0f\u20e3 sky",
    "Japanese dots": "・water（水）\n・pier（桟橋）\n・sky（空）",
    "translations after colons": "1. Water：水\n2. Pier：码头\n3. Sky：天空",
    "a label in Chinese": "答案：water、pier、sky",
    "Chinese sentences around": "好的，以下是三个词：\nwater\npier\nsky\n\n以上是按频率排列的三个词。",
    "a Chinese sentence without an end": "water\npier\nsky\n希望对你有帮助",
    "a Japanese sentence": "water\npier\nsky\n\n以上です。",
    "lenticular brackets": "【water】、【pier】、【sky】",
    "wide spaces": "water　pier　sky",
    "code side by side": "`water` `pier` `sky`",
    "footnotes": "water¹\npier²\nsky³",
    "a mark at the end": "water\npier\nsky<|im_end|>\n",
    "the window's own words": "Thought for 8 seconds\n\nwater\npier\nsky",
    "a role": "assistant\n\nwater\npier\nsky",
    "another turn": "water\npier\nsky\n\nUser: thanks",
}


@pytest.mark.parametrize("name", ANSWERS)
def test_parse_of_what_models_answer(name):
    assert BackgroundSet.parse(ANSWERS[name]) == THREE


@pytest.mark.parametrize(
    "words",
    [
        ("railway track", "snow-covered field", "x-ray table"),
        ("sailor's knot", "st. bernard kennel", "salt & pepper"),
        ("trash can", "no parking sign", "bed and breakfast"),
        ("käfer", "码头", "2 story house"),
    ],
)
@pytest.mark.parametrize("mark", ["", "- ", "1. ", "* ", "• "])
def test_parse_keeps_words_of_several_parts(words, mark):
    assert BackgroundSet.parse("\n".join(mark + word for word in words)) == words


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ("<think>\nboats are on water\nwater\npier", "'<think>'"),
        ("<|channel|>analysis<|message|>x\nwater\npier", "'<|channel|>analysis<|message|>x'"),
        ('{"boat": ["water"], "car": ["road"]}', """'{"boat": ["water"], "car": ["road"]}'"""),
        ('{"water": "it floats on it", "pier": "it lies there"}', """'{"water": """),
        ("[1, 2]", "'[1, 2]'"),
        ("| a | b |\n|---|---|\n| water | pier |", "'| a | b |'"),
        ("1. Nature\n   - water\n   - sky", "'- water'"),
        ("- Nature:\n- water", "'- Nature:'"),
        ("boat: water, pier\ncar: road, kerb", "'boat: water, pier'"),
        ("First: water\nSecond: pier", "'First: water'"),
        ("water\npier\nThese are common.\nsky", "'These are common.'"),
        ("- water\npier", "'pier'"),
        ("water/pier\nsky", "'water/pier'"),
        ("water - pier - sky", "'water - pier - sky'"),
        ("Absolutely.\nwater\npier", "'Absolutely.'"),
        ("\\item water", r"'\\item water'"),
        ("1\nwater\n2\npier", "'1'"),
        ("```\nwater\n```\n```\npier\n```", "2 code blocks"),
        ("1. Water\n- it floats there\n2. Pier\n- it lies there", "'- it floats there'"),
        ("1. Water\n- below\n- wet\n2. Pier", "'- below'"),
        ("Boat\n\nwater\npier", "'Boat'"),
        ("water\npier\n\nViel Erfolg", "'Viel Erfolg'"),
        ("water\npier\n\nTotal: 2", "'Total: 2'"),
        ("plaintext\nCopy code\nwater\npier", "'Copy code'"),
        ("water, e.g. waves\npier", "'water, e.g. waves'"),
        ("water or waves\npier", "'water or waves'"),
        ("water、pier和sky", "'water, pier和sky'"),
        ("word,reason\nwater,below", "'word,reason'"),
        ('["water", "pier", "sk', """'["water", "pier", "sk'"""),
        ("water pier sky shore", "'water pier sky shore'"),
        ("water  pier", "'water  pier'"),
        ("analysisThree words.assistantfinalwater\npier", "'analysisThree words.assistantfinalwater'"),
    ],
)
def test_parse_refuses_what_is_unclear(answer, line):
    text = "Expected argument `answer` to be a list of words, but got "
    with pytest.raises(ValueError, match=re.escape(text)) as error:
        BackgroundSet.parse(answer)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_parse_of_a_book():
    thought = f"<think>{'It is on water. ' * 5000}</think>"
    assert BackgroundSet.parse(f"{thought}\nwater\npier\nsky") == THREE
    with pytest.raises(ValueError, match="to be a list of words, but got a text of 20000 characters"):
        BackgroundSet.parse("a" * 20000)


def test_parse_of_no_text():
    with pytest.raises(TypeError, match="argument `answer` to be a text, but got list"):
        BackgroundSet.parse(["water"])


@pytest.mark.parametrize("answer", ["Boats are often on water, near a pier.", "I'm sorry, I can't help.", "[]"])
def test_parse_of_prose(answer):
    with pytest.raises(ValueError, match=re.escape("Expected argument `answer` to be a list of words, but got ")):
        BackgroundSet.parse(answer)


@pytest.mark.parametrize("answer", ["", " \n", "Here are the words:", "1.\n2."])
def test_parse_finds_nothing(answer):
    with pytest.raises(ValueError, match=re.escape("Expected argument `answer` to be a list of words, but got ")):
        BackgroundSet.parse(answer)
