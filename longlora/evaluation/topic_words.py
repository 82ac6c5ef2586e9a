"""The words of the conversations about topics: what they are about, and how people talk about it."""

# A topic is an aspect of a subject: "the history of beekeeping".
ASPECTS = (
    "history of",
    "cost of",
    "future of",
    "dangers of",
    "beginnings of",
    "tools of",
    "language of",
    "myths about",
    "mathematics of",
    "teaching of",
    "art of",
    "weather for",
)
SUBJECTS = (
    "beekeeping",
    "lighthouse repair",
    "mountain railways",
    "glassblowing",
    "desert farming",
    "city birds",
    "chess endings",
    "bread baking",
    "river locks",
    "kite flying",
    "map making",
    "bicycle racing",
    "stage lighting",
    "whale watching",
    "clockmaking",
    "vegetable gardens",
    "deep sea diving",
    "paper folding",
    "night trains",
    "bridge painting",
    "cheese cellars",
    "choir singing",
    "stone walls",
    "weather balloons",
    "ice skating",
    "pottery kilns",
    "harbour pilots",
    "bookbinding",
    "wild mushrooms",
    "telescope mirrors",
    "sheepdogs",
    "street theatre",
    "cable cars",
    "salt mining",
    "wooden boats",
    "morning radio",
    "fire towers",
    "perfume making",
    "long distance walking",
    "puppet shows",
    "windmills",
    "coral reefs",
    "violin strings",
    "rooftop swimming",
    "moss gardens",
    "postage stamps",
    "volcano tours",
    "silk weaving",
    "bell towers",
    "crossword puzzles",
    "tea houses",
    "snow ploughs",
    "marathon shoes",
    "museum guards",
    "orchard pruning",
    "hot air ballooning",
    "sandcastles",
    "canal boats",
    "star charts",
    "mountain huts",
    "fountain pens",
    "honey cakes",
    "amateur rockets",
    "tide tables",
)
# Questions about {topic}, each with its answer. A conversation has some of them in random order.
EXCHANGES = (
    (
        "How did you come across the {topic} in the first place?",
        "A neighbour lent me a thin book about it on a rainy weekend. I read it in one sitting, and the next "
        "morning I wrote down eleven questions that it had left open.",
    ),
    (
        "What do most people get wrong here?",
        "They look for one big rule. When you ask those who have worked on the {topic} for years, they talk "
        "about many small habits, and about patience with results that come late.",
    ),
    (
        "Is there a place where one can see this with one's own eyes?",
        "A small hall near the station shows it every second Sunday. The guide is a retired engineer, who "
        "answers anything as long as nobody touches the models.",
    ),
    (
        "Who should I ask if I want to know more?",
        "Ask two people who disagree. The first will tell you what is known about the {topic}, and the "
        "second will tell you how little of it was ever measured.",
    ),
    (
        "Does it take a lot of time?",
        "An hour a week is enough in the beginning. After a year most people spend whole evenings on it, and "
        "nobody I know has complained so far.",
    ),
    (
        "What surprised you most?",
        "That the records go back so far. There are letters from three centuries ago that treat the {topic} "
        "with the same doubts that we have today.",
    ),
    (
        "Could a school class learn something from it?",
        "Yes, if the children may try it before anybody explains it. They remember what they have spilled, "
        "dropped or mended much longer than what they have copied from a board.",
    ),
    (
        "What would you change if you could?",
        "I would publish the failures. Everybody who writes about the {topic} shows the few attempts that "
        "went well, and so the same mistakes are made again in every town.",
    ),
    (
        "Is there anything that one should avoid?",
        "Do not buy equipment in the first month. Borrow it, break nothing, and find out which part of the "
        "work you enjoy; most of the rest can be left to others.",
    ),
    (
        "Has it become easier over the years?",
        "Some of it has. The materials are better and the advice is free, but the {topic} still asks for the "
        "same attention, and attention is what people have least of.",
    ),
    (
        "Where do the experts disagree?",
        "They disagree about the order of things. One school prepares for weeks and then works for a day; "
        "the other begins at once and corrects what does not hold.",
    ),
    (
        "Can you sum that up for a friend of mine?",
        "Tell your friend that it looks harder than it is. Start small, keep notes, and come back to the "
        "{topic} after a break, because most of the understanding comes then.",
    ),
)
EACH = 4  # exchanges of a conversation about a topic
