"""Ways to ask for each attribute of the world's things.

In: the table below. Out: for each attribute phrases that follow "give", and whole questions.
"""

import re

ASKED = """
young
    the name of its young; the word for its baby; the young animal's name; what its baby is called; its
    offspring; the child of the animal; the name of a baby animal of this sort;
    What is a baby of this animal called?; How do people call its young?; What is its offspring called?; How is
    the little one named?;
sound
    the sound it makes; the animal's sound; the noise that the animal makes; its call; the cry of the animal;
    how it sounds; the word for its voice;
    Which sound does the animal make?; What noise does it make?; How does the animal sound?; What does the
    animal say?;
home
    the place where it lives; the animal's home; its home; where the animal lives; the house of the animal; its
    dwelling; the spot where it sleeps;
    Where does the animal live?; In which place does it sleep?; Where would I find the animal?; Where is its
    home?;
group
    the word for a group of them; the name of a group of these animals; what many of them together are called;
    the collective noun; the word for several of them together; the group name;
    What is a group of these animals called?; How do people call many of them together?; What is the collective
    noun for these animals?;
class
    the class of the animal; its animal class; which class of animals it belongs to; its biological class; the
    sort of animal it is; whether it is a bird, a mammal or something else;
    Is it a mammal, a bird, a reptile or something else?; To which class of animals does it belong?; What sort
    of animal is it?;
covering
    what covers its body; its body covering; the covering of the animal; what its body is covered with; what is
    on its skin; its coat; what its outside is made of;
    What covers the animal's body?; What does it wear on its body?; What is its coat made of?;
diet
    what it eats; the animal's food; its favourite meal; something that the animal eats; its diet; its prey or
    food; what I should feed it;
    What does the animal eat?; Which food does it like?; What should I feed it?;
capital
    its capital; the capital of the country; the capital city; the city where its government sits; the main
    city; the seat of government; the capital town;
    What is the capital of the country?; Which city is the capital?; Where does its government sit?;
continent
    its continent; the continent of the country; the continent it lies on; the part of the world it is in; the
    landmass it is part of; the region of the world; on which continent it lies;
    On which continent does the country lie?; In which part of the world is it?; Which continent is it part of?;
language
    its language; the language of the country; the language people speak there; the tongue spoken there; the
    official language; what people speak there; the main language;
    Which language do people speak there?; What do people speak in the country?; What is its official language?;
currency
    its currency; the currency of the country; the money people use there; the money that is paid with there;
    the coin or note used there; its money; what people pay with;
    Which money do people use there?; What is the currency of the country?; How do people pay there?;
dish
    a dish from there; a typical dish of the country; its best known dish; a meal people cook there; its
    national dish; some food from there; what people like to eat there;
    Which dish comes from the country?; What do people cook there?; What is its national dish?;
colour
    its colour; the colour of the food; which colour it has; the colour it has when ripe; its color; what it
    looks like in color; the color of its skin;
    Which colour does it have?; What is the colour of this food?; What color is it?;
taste
    its taste; how it tastes; the taste of the food; the flavour; its flavour; how it is on the tongue; the word
    for its flavor;
    How does it taste?; Which flavour does this food have?; What does it taste like?;
type
    its type of food; the type of plant food it is; the food group it belongs to; which type of food it is;
    whether it is a fruit, a nut, a root or something else; its botanical type; the sort of food it is;
    Is it a fruit, a root, a nut or something else?; Which type of food is it?; What sort of food is it?;
origin
    the place where it grows; where it grows; the place it is picked from; what it grows in; where farmers get
    it; where it comes from; the kind of place that produces it;
    Where does this food grow?; From which place is it picked?; Where does it come from?;
recipe
    something made from it; what people make from it; a thing cooks make with it; a recipe that uses it; a
    product made of it; what it is cooked into; a use for it in the kitchen;
    What can be made from this food?; What do cooks make with it?; What is a product of it?;
use
    what it is used to do; the work it does; the verb for its use; the action it is used for; its purpose; what
    one does with it; the job that it does;
    What do people do with this tool?; Which action is the tool used for?; What is it for?;
worker
    who uses it; the worker who uses it; the job of its user; the person who works with it; the profession that
    needs it; who owns one; the trade of its user;
    Who works with this tool?; Which worker uses it?; Whose tool is it?;
target
    what it is used on; the thing it works on; what the tool is applied to; the object that it is used on; the
    material it works on; what it touches; what it is good for working on;
    On what is the tool used?; What does the tool work on?; Which material does it work on?;
storage
    where it is kept; the place where the tool is kept; where people store it; its usual storage place; the room
    or place it belongs in; where it lies when nobody needs it; where to look for it;
    Where do people keep this tool?; In which place is it stored?; Where should I look for this tool?;
plural
    its plural; the plural of the word; the plural form; the word for more than one; the form for many; the word
    for two of them; how it is written in the plural;
    What is the plural of the word?; How do you write more than one of it?; How is it written in the plural?;
kind
    the kind of thing it is; what kind of thing it is; which of animal, country, food and tool it is; its
    category; the group of things it belongs to; whether it is an animal, a country, a food or a tool;
    Is it an animal, a country, a food or a tool?; What kind of thing is it?; Which category does it belong to?;
initial
    its first letter; the first letter of the word; the letter it starts with; the initial; its first character;
    the capital letter it begins with; the letter at its start;
    With which letter does the word start?; What is the first letter of the word?; What letter does it begin
    with?;
"""


def phrases_and_questions() -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """{attribute: (phrases, questions)}; each list ends with a semicolon, and lines break anywhere."""
    found = {}
    for block in re.split(r"\n(?=\S)", ASKED.strip()):
        name, *lines = block.splitlines()
        asked = [part.strip() for part in " ".join(line.strip() for line in lines).split(";") if part.strip()]
        questions = tuple(part for part in asked if part.endswith("?"))
        found[name] = (tuple(part for part in asked if part not in questions), questions)
    return found
