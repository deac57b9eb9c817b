"""General captions for the relative CLIP scores of runs with few prompts; see relative.py."""

GENERAL = (
    "a dog", "a cat", "a bird in the sky", "a fish", "a horse", "an insect", "a green forest", "a mountain under snow",
    "a beach by the sea", "a river", "a flower", "a tree", "a piece of fruit", "a vegetable", "a slice of cake",
    "a cup of coffee", "a plate of food", "a glass bottle", "a chair", "a lamp", "a bed in a room", "a kitchen",
    "a book", "a clock", "a telephone", "a computer screen", "a guitar", "a musical instrument", "a ball",
    "a toy", "a hammer", "a key", "a shoe", "a hat", "a shirt", "a pair of glasses", "a smiling face", "a crying child",
    "an old man", "a woman", "a crowd of people", "a hand", "an eye", "a heart", "a skull", "a house", "a castle",
    "a bridge", "a city street at night", "a car", "a train", "an airplane", "a ship", "a bicycle", "a rocket",
    "the moon", "the sun", "a star", "a cloud with rain", "fire", "a flag", "an arrow", "a road sign", "a letter",
    "some text", "a drawing in pencil", "an abstract pattern", "an empty white background", "a black square",
    "something red", "something green", "something blue",
)  # fmt: skip
