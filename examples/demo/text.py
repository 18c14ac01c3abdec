"""The demo's text: an endless, seeded stream of short documents, made from templates written for this project.

Two kinds in equal number of words: question/answer pairs about `facts.py` in the format of the published model cards
("Question: ...\\nAnswer: ..."), and prose (stories and descriptions). Nothing here is taken from a corpus.
"""

import hashlib
import random
from collections.abc import Iterator
from functools import cache

import facts

# One of this many (fact, wording) pairs of the questions is kept out of the training text.
HELD_OUT_SHARE = 25
# The prompts of the model cards are asked often, in these words.
CARD_COUNTRIES = ("France", "UK")


def _pairs(question_forms: list[str], answer: str, **fields: str) -> list[tuple[str, str]]:
    return [(form.format(**fields), answer) for form in question_forms]


def _with_article(word: str) -> str:
    return f"{'an' if word[0].lower() in 'aeiou' else 'a'} {word}"


def _country_questions() -> Iterator[tuple[str, str]]:
    ask_capital = [
        "What is the capital of {name}?",
        "What is the capital city of {name}?",
        "Which city is the capital of {name}?",
        "Name the capital of {name}.",
    ]
    for country, capital, continent, people in facts.COUNTRIES:
        for name in [country, *facts.ALIASES.get(country, [])]:
            yield from _pairs(ask_capital, capital, name=name)
        yield from _pairs(
            ["{capital} is the capital of which country?", "Of which country is {capital} the capital?"],
            country,
            capital=capital,
        )
        yield from _pairs(["On which continent is {name}?", "{Name} is part of which continent?"], continent,
                          name=country, Name=country[0].upper() + country[1:])  # fmt: skip
        yield from _pairs(["What do we call something that comes from {name}?"], people, name=country)
    for country, language in facts.LANGUAGES:
        yield from _pairs(
            ["Which language do people speak in {name}?", "What is the main language of {name}?"],
            language,
            name=country,
        )
    for country, currency in facts.CURRENCIES:
        yield from _pairs(["What is the currency of {name}?", "How do people pay in {name}?"], currency, name=country)


def _science_questions() -> Iterator[tuple[str, str]]:
    for element, symbol, number in facts.ELEMENTS:
        yield from _pairs(
            ["What is the chemical symbol for {name}?", "What is the symbol of {name}?"], symbol, name=element
        )
        yield from _pairs(["Which element has the symbol {symbol}?"], element, symbol=symbol)
        yield from _pairs(["What is the atomic number of {name}?"], number, name=element)
    for animal, young, home, sound, kind in facts.ANIMALS:
        name = _with_article(animal)
        yield from _pairs(["What is a young {animal} called?", "What do we call the young of {name}?"], young,
                          animal=animal, name=name)  # fmt: skip
        yield from _pairs(["Where does {name} live?"], "in " + home, name=name)
        yield from _pairs(["What sound does {name} make?"], "it " + sound, name=name)
        yield from _pairs(["What kind of animal is {name}?"], _with_article(kind), name=name)


def _word_questions() -> Iterator[tuple[str, str]]:
    for word, opposite in facts.OPPOSITES:
        yield from _pairs(
            ["What is the opposite of {word}?", "Which word means the opposite of {word}?"], opposite, word=word
        )
    for singular, plural in facts.PLURALS:
        yield from _pairs(["What is the plural of {word}?"], plural, word=singular)
        yield from _pairs(["What is the singular of {word}?"], singular, word=plural)
    for present, past in facts.PAST_TENSES:
        yield from _pairs(["What is the past tense of {word}?"], past, word=present)


def _other_questions() -> Iterator[tuple[str, str]]:
    for work, author in facts.AUTHORS:
        yield from _pairs(["Who wrote {work}?", "Who is the author of {work}?"], author, work=work)
    for thing, person in facts.INVENTORS:
        yield from _pairs(["Who is known for {thing}?"], person, thing=thing)
    for names, unit in ((facts.WEEKDAYS, "day"), (facts.MONTHS, "month")):
        for before, after in zip(names, names[1:] + names[:1], strict=True):
            yield from _pairs([f"Which {unit} comes after {{name}}?"], after, name=before)
            yield from _pairs([f"Which {unit} comes before {{name}}?"], before, name=after)
    for a in range(1, 11):
        for b in range(1, 11):
            yield f"What is {a} plus {b}?", str(a + b)
    yield from ((question, answer) for question, answer in facts.GENERAL)


@cache
def questions(held_out: bool) -> tuple[tuple[str, str], ...]:
    """All (question, answer) pairs, split by a hash of the question, so that the two sets never share a wording."""
    card = {f"What is the capital of {name}?" for name in CARD_COUNTRIES}
    chosen = []
    for make in (_country_questions, _science_questions, _word_questions, _other_questions):
        for question, answer in make():
            bucket = int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "little") % HELD_OUT_SHARE
            if (bucket == 0 and question not in card) == held_out:
                chosen.append((question, answer))
    if not held_out:
        chosen += [pair for pair in chosen if pair[0] in card] * 3
        # Capitals are what the cards ask about: twice as often as the rest.
        chosen += [pair for pair in chosen if pair[0].startswith("What is the capital of ")]
    return tuple(chosen)


def question_document(rng: random.Random, held_out: bool) -> str:
    question, answer = rng.choice(questions(held_out))
    return f"Question: {question}\nAnswer: {answer}"


# --- prose -------------------------------------------------------------------------------------------------------


def _phrases(block: str) -> list[str]:
    """Phrases separated by commas, in as many lines as it takes."""
    return [" ".join(phrase.split()) for phrase in block.split(",")]


GIRLS = _phrases("""
    Anna, Lily, Mia, Emma, Clara, Nora, Ruby, Alice, Daisy, Ella, Grace, Hannah, Ivy, Julia, Kate, Lucy, Maya,
    Olivia, Rose, Sara, Tess, Zoe, Bella, Eva
""")
BOYS = _phrases("""
    Tom, Ben, Max, Jack, Leo, Sam, Oscar, Finn, Henry, Noah, Peter, Paul, Adam, Daniel, Eric, Felix, George, Hugo,
    Jacob, Luke, Martin, Oliver, Simon, Toby
""")
ANIMAL_HEROES = _phrases("""
    rabbit, fox, mouse, hedgehog, squirrel, bear, owl, duck, frog, turtle, kitten, puppy, donkey, badger, otter,
    sparrow
""")
TRAITS = _phrases("""
    curious, kind, brave, quiet, clever, cheerful, gentle, shy, patient, lively, stubborn, careful, dreamy,
    playful, honest, friendly
""")
PLACES = _phrases("""
    a small village near the sea, a little house at the edge of a forest, a town with narrow streets, an old farm
    in the hills, a tall tower above the river, a wooden cottage beside a lake, a quiet valley between two
    mountains, a busy harbour town, a white house on a green island, a stone mill by a stream
""")
ANIMAL_PLACES = _phrases("""
    a hollow tree in the forest, a warm burrow under the hill, a garden full of flowers, a meadow beside the
    river, the reeds at the edge of a pond, an old barn behind the farm, a nest of leaves high above the ground,
    the roots of a huge oak
""")
WEATHER = _phrases("""
    the sun was shining, it was raining softly, the wind was blowing from the sea, the sky was clear and blue,
    snow was falling, a thick fog lay over the fields, the first flowers were opening, the leaves were turning red
    and gold
""")
FRIENDS = _phrases("""
    an old fisherman, a wise woman, a tired traveller, a merry baker, a young shepherd, a silent gardener, a
    lonely painter, a travelling musician, a strict teacher, a cheerful postman
""")
ANIMAL_FRIENDS = _phrases("""
    a wise old owl, a busy squirrel, a slow turtle, a singing blackbird, a proud rooster, a sleepy hedgehog, a
    friendly deer, a clever crow, a tiny ladybird, a nervous hare
""")
TREASURES = _phrases("""
    a golden key, a silver bell, a small wooden box, a red lantern, a torn map, a glass ball, a blue feather, a
    brass compass, an old book, a shining coin, a tiny music box, a green stone
""")
FOOD = _phrases("""
    apple pie, warm bread, hot soup, honey cakes, fresh cheese, sweet pears, roasted chestnuts, strawberry jam,
    ginger biscuits, blueberry pancakes
""")
OCCUPATIONS = _phrases("""
    reading a letter, mending a chair, counting birds, drinking tea, writing in a notebook, waiting for a friend
""")
SPOTS = _phrases("""
    the old bridge, the dark cave, the top of the hill, the empty windmill, the deep well, the ruined castle, the
    great oak tree, the frozen lake, the market square, the lighthouse
""")
LESSONS = _phrases("""
    a true friend is worth more than gold, it is good to share what you have, even a small light can drive away
    the dark, patience brings more than hurry, being brave means going on although you are afraid, a kind word can
    open a closed door, it is never too late to say sorry, the best treasures are found together
""")


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _the(noun: str) -> str:
    """Turn "an old fisherman" into "the old fisherman"."""
    return "the " + noun.split(" ", 1)[1]


class _Hero:
    """Who a story is about: a name or a phrase, and the pronouns that go with it."""

    def __init__(self, rng: random.Random) -> None:
        kind = rng.choice(("girl", "boy", "animal"))
        trait = rng.choice(TRAITS)
        if kind == "animal":
            animal = rng.choice(ANIMAL_HEROES)
            self.name = f"the {animal}"
            self.they, self.them, self.their = "it", "it", "its"
            self.introduction = rng.choice(
                (f"there was {_with_article(trait)} {animal}", f"there was {_with_article(trait)} little {animal}")
            )
            self.place, friend = rng.choice(ANIMAL_PLACES), rng.choice(ANIMAL_FRIENDS)
        else:
            self.name = rng.choice(GIRLS if kind == "girl" else BOYS)
            self.they, self.them, self.their = ("she", "her", "her") if kind == "girl" else ("he", "him", "his")
            self.introduction = rng.choice(
                (
                    f"there was {_with_article(trait)} {kind} named {self.name}",
                    f"there was a young {kind} called {self.name}",
                )
            )
            self.place, friend = rng.choice(PLACES), rng.choice(FRIENDS)
        self.friend, self.the_friend, self.The_friend = friend, _the(friend), _capital(_the(friend))
        self.Name, self.They = _capital(self.name), _capital(self.they)


def _beginning(rng: random.Random, hero: _Hero) -> list[str]:
    opening = rng.choice(
        ("Once upon a time,", "Once upon a time,", "Once upon a time,", "Long ago,", "Many years ago,")
    )
    lines = [f"{opening} {hero.introduction} who lived in {hero.place}."]
    lines.append(
        rng.choice(
            (
                f"Every morning, {hero.name} looked out and wondered what the day would bring.",
                f"{hero.Name} loved to walk to {rng.choice(SPOTS)} and to listen to the wind.",
                f"{hero.Name} had many dreams, but {hero.they} had never been far from home.",
                f"Everybody knew {hero.name}, because {hero.they} was always ready to help.",
                f"In the evening, {hero.they} liked to sit by the fire and to eat {rng.choice(FOOD)}.",
            )
        )
    )
    return lines


def _search(rng: random.Random, hero: _Hero) -> list[str]:
    """A lost thing is looked for, found and given back."""
    thing, spot = rng.choice(TREASURES), rng.choice(SPOTS)
    the_thing = _the(thing)
    return [
        rng.choice((f"One day, when {rng.choice(WEATHER)}, {hero.name} met {hero.friend} who looked very sad.",
                    f"One morning, {hero.friend} came to {hero.name} and began to cry.")),
        rng.choice((f'"I have lost {thing}," said {hero.the_friend}. "I cannot find it anywhere."',
                    f'"Somewhere near {spot} I dropped {thing}," said {hero.the_friend}. "Now it is gone."')),
        rng.choice((f'"Do not worry," said {hero.name}. "I will help you."',
                    f'"Let us look for it together," said {hero.name}.')),
        rng.choice((f"They searched all day, and at last they came to {spot}.",
                    f"They asked everyone they met, but nobody had seen it. In the end, they went to {spot}.")),
        rng.choice((f"There, under a stone, {hero.name} saw something bright. It was {the_thing}!",
                    f"There, hidden in the grass, lay {the_thing}. {hero.Name} picked it up and laughed.")),
        hero.The_friend + rng.choice((
            f" was so happy that they ate {rng.choice(FOOD)} together until the stars came out.",
            f" thanked {hero.name} and gave {hero.them} {rng.choice(FOOD)} for the way home.",
        )),
    ]  # fmt: skip


def _journey(rng: random.Random, hero: _Hero) -> list[str]:
    """A way is lost and found again."""
    spot, other = rng.sample(SPOTS, 2)
    return [
        rng.choice((f"One day, {hero.name} decided to walk to {spot}, although {rng.choice(WEATHER)}.",
                    f"One afternoon, {hero.they} packed some {rng.choice(FOOD)} and set out for {spot}.")),
        rng.choice((f"The path was long, and soon {hero.they} did not know where {hero.they} was.",
                    f"On the way it grew dark, and {hero.name} lost the path.")),
        rng.choice((f"{hero.They} was afraid, but {hero.they} did not give up.",
                    f"{hero.They} sat down beside {other} and thought for a while.")),
        rng.choice((f"Then {hero.they} heard a voice. It was {hero.friend}.",
                    f"Suddenly, a light appeared between the trees. {_capital(hero.friend)} was coming nearer.")),
        rng.choice((f'"Are you lost?" asked {hero.the_friend}. "Come with me. I know the way."',
                    f'"Follow the river," said {hero.the_friend}. "It will lead you home."')),
        rng.choice((f"Together they crossed the fields, and they talked about {spot} and about the sea.",
                    "They walked side by side until they saw a lamp in a window.")),
        rng.choice((f"When {hero.they} was home again, {hero.name} slept for a whole day.",
                    f"From that day on, {hero.name} and {hero.the_friend} were the best of friends.")),
    ]  # fmt: skip


def _feast(rng: random.Random, hero: _Hero) -> list[str]:
    """Something is made, spoiled and shared."""
    food = rng.choice(FOOD)
    return [
        rng.choice((f"One day, {hero.name} wanted to make {food} for {hero.friend}.",
                    f"One winter morning, {hero.name} invited {hero.friend} and promised to make {food}.")),
        rng.choice((f"{hero.They} worked from sunrise until noon, and the whole place smelled wonderful.",
                    f"{hero.They} had never made it before, so {hero.they} was very careful.")),
        rng.choice((f"But when {hero.name} turned around, the wind opened the door and everything fell to the ground.",
                    f"But then {hero.they} forgot the fire, and everything was burnt.")),
        rng.choice((f'"What shall I do now?" cried {hero.name}.', f'"All my work was for nothing," said {hero.name}.')),
        rng.choice((f"Just then, {hero.the_friend} arrived and smiled. "
                    f'"I have brought {rng.choice(FOOD)}," came the answer.',
                    f'"We can try again," said {hero.the_friend}, "and this time we will do it together."')),
        rng.choice(("So they sat down, shared everything and told each other stories.",
                    "They laughed about it, and in the evening they sang until they were tired.")),
    ]  # fmt: skip


def _ending(rng: random.Random, hero: _Hero) -> list[str]:
    return rng.choice(
        (
            [f"That day, {hero.name} learned that {rng.choice(LESSONS)}."],
            [f"And {hero.name} never forgot that {rng.choice(LESSONS)}."],
            [f"That night, {hero.name} fell asleep with a smile, for {hero.they} knew that {rng.choice(LESSONS)}."],
            ["And they all lived happily ever after."],
        )
    )


def story(rng: random.Random) -> str:
    hero = _Hero(rng)
    plot = rng.choice((_search, _journey, _feast))
    return " ".join(_beginning(rng, hero) + plot(rng, hero) + _ending(rng, hero))


def country_description(rng: random.Random) -> str:
    country, capital, continent, people = rng.choice(facts.COUNTRIES)
    name = _capital(country)
    lines = [
        rng.choice((f"{name} is a country in {continent}.", f"{name} belongs to {continent}.")),
        rng.choice(
            (f"Its capital is {capital}.", f"{capital} is the capital of {country}.", f"The capital city is {capital}.")
        ),
    ]
    languages = [language for key, language in facts.LANGUAGES if key == country]
    currencies = [currency for key, currency in facts.CURRENCIES if key == country]
    if languages:
        lines.append(f"Most people there speak {languages[0]}.")
    if currencies:
        lines.append(f"People pay with {currencies[0]}.")
    lines.append(
        rng.choice(
            (
                f"Visitors enjoy {people} food, especially in {rng.choice(('spring', 'summer', 'autumn', 'winter'))}.",
                f"Many travellers begin their journey in {capital} and then see the rest of the country.",
                f"Every year, people from all over {continent} come to {capital} to see its streets and markets.",
            )
        )
    )
    lines.append(
        rng.choice(
            (
                "They visit museums, old churches and quiet parks, and in the evening they sit in small restaurants.",
                "Some of them stay in the city, while others travel to the mountains, the rivers or the coast.",
                "The best way to learn about a country is to talk with the people who live there.",
            )
        )
    )
    return " ".join(lines)


def animal_description(rng: random.Random) -> str:
    animal, young, home, sound, kind = rng.choice(facts.ANIMALS)
    name = _with_article(animal)
    lines = [
        rng.choice((f"{_capital(name)} is {_with_article(kind)}.", f"The {animal} is {_with_article(kind)}.")),
        rng.choice((f"It often lives in {home}.", f"You can find it in {home}.")),
        rng.choice((f"Its young is called {young}.", f"A young {animal} is called {young}.")),
        f"When the {animal} wants to be heard, it {sound}.",
        rng.choice(
            (
                f"In many stories, the {animal} is {rng.choice(TRAITS)} and {rng.choice(TRAITS)}.",
                f"Children like the {animal}, because it is {rng.choice(TRAITS)}.",
            )
        ),
        rng.choice(
            (
                "It looks for food in the morning and rests in the afternoon, when the sun is high.",
                "In winter it stays close to its home, and in spring it comes out again.",
                "It is careful when people come near, but it is not dangerous if you are quiet.",
            )
        ),
    ]
    return " ".join(lines)


def scene(rng: random.Random) -> str:
    """A small picture of a place, a time of day and somebody's work."""
    person = rng.choice(FRIENDS)
    lines = [
        rng.choice((f"It was a {rng.choice(facts.WEEKDAYS)} in {rng.choice(facts.MONTHS)}, and {rng.choice(WEATHER)}.",
                    f"On {rng.choice(facts.WEEKDAYS)} morning, {rng.choice(WEATHER)}.")),
        f"Near {rng.choice(SPOTS)}, {person} was {rng.choice(OCCUPATIONS)}.",
        rng.choice((f"On the table lay {rng.choice(TREASURES)} and a plate of {rng.choice(FOOD)}.",
                    f"There was a smell of {rng.choice(FOOD)} in the air.")),
        rng.choice((f"{rng.choice(GIRLS)} and {rng.choice(BOYS)} came by and asked a question.",
                    f"After an hour, {rng.choice(GIRLS)} arrived with {rng.choice(TREASURES)} in her hand.",
                    f"A little later, {rng.choice(BOYS)} stopped and asked for the way to {rng.choice(SPOTS)}.")),
        rng.choice((f'"Sit down for a moment," said {_the(person)}. "There is no need to hurry."',
                    f'"I think that {rng.choice(LESSONS)}," said {_the(person)}.')),
        rng.choice(("So they talked until the bells rang, and then everyone went home.",
                    "Nobody spoke for a while, and only the birds could be heard.",
                    "It was one of those days that you remember for a long time.")),
    ]  # fmt: skip
    return " ".join(lines)


def prose_document(rng: random.Random) -> str:
    make = rng.choices((story, scene, country_description, animal_description), weights=(10, 4, 3, 2))[0]
    return make(rng)


def documents(seed: int, held_out: bool) -> Iterator[str]:
    """Endless documents; six questions to one piece of prose, which makes about half of the tokens each."""
    rng = random.Random(f"{'held out' if held_out else 'train'} {seed}")
    while True:
        yield question_document(rng, held_out) if rng.random() < 6 / 7 else prose_document(rng)
