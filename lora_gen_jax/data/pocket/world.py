"""A small world of things: the facts behind the embedded tasks.

In: the tables below, written for this project. Out: `ATTRIBUTES`: for each attribute, what it says of which things.
Several attributes hold of every thing ("owl": owlet, hoot, barn, bird, feathers, owls, O, animal), so that a query
alone says nothing about the task; the system prompt does.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True, eq=False)
class Attribute:
    """A relation between a thing and a word.

    Attributes:
        name: short name, part of a task's name.
        values: from thing to word.
        phrases: ways to say what is asked for, to follow "give"; the more of them, the more prompts are understood.
        questions: the same as whole questions.
    """

    name: str
    values: dict[str, str]
    phrases: tuple[str, ...]
    questions: tuple[str, ...]


ANIMALS = """
owl       owls       owlet    hoot     barn      parliament bird      feathers mice
cat       cats       kitten   meow     house     clowder    mammal    fur      milk
dog       dogs       puppy    bark     kennel    pack       mammal    fur      bones
cow       cows       calf     moo      farm      herd       mammal    hair     grass
horse     horses     foal     neigh    stable    team       mammal    hair     oats
sheep     sheep      lamb     bleat    fold      flock      mammal    wool     clover
pig       pigs       piglet   oink     sty       drift      mammal    bristles scraps
duck      ducks      duckling quack    pond      raft       bird      feathers weeds
goose     geese      gosling  honk     lake      gaggle     bird      feathers grass
hen       hens       chick    cluck    coop      brood      bird      feathers corn
frog      frogs      tadpole  croak    swamp     army       amphibian skin     flies
bee       bees       larva    buzz     hive      swarm      insect    fuzz     nectar
bear      bears      cub      growl    cave      sleuth     mammal    fur      honey
lion      lions      cub      roar     savanna   pride      mammal    fur      zebras
wolf      wolves     pup      howl     den       pack       mammal    fur      deer
fox       foxes      kit      yelp     burrow    skulk      mammal    fur      rabbits
mouse     mice       pinky    squeak   hole      nest       mammal    fur      cheese
eagle     eagles     eaglet   scream   cliff     aerie      bird      feathers fish
snake     snakes     snakelet hiss     pit       knot       reptile   scales   eggs
elephant  elephants  calf     trumpet  plain     parade     mammal    skin     leaves
whale     whales     calf     song     ocean     pod        mammal    blubber  krill
crow      crows      chick    caw      tree      murder     bird      feathers seeds
donkey    donkeys    foal     bray     paddock   drove      mammal    hair     hay
monkey    monkeys    infant   chatter  jungle    troop      mammal    fur      fruit
"""
COUNTRIES = """
France    Paris     Europe  French     euro     crepes
Japan     Tokyo     Asia    Japanese   yen      sushi
Italy     Rome      Europe  Italian    euro     pizza
Spain     Madrid    Europe  Spanish    euro     paella
Germany   Berlin    Europe  German     euro     sausages
Poland    Warsaw    Europe  Polish     zloty    dumplings
Greece    Athens    Europe  Greek      euro     moussaka
Russia    Moscow    Europe  Russian    ruble    borscht
China     Beijing   Asia    Mandarin   yuan     noodles
India     Delhi     Asia    Hindi      rupee    curry
Korea     Seoul     Asia    Korean     won      kimchi
Vietnam   Hanoi     Asia    Vietnamese dong     pho
Egypt     Cairo     Africa  Arabic     pound    koshari
Kenya     Nairobi   Africa  Swahili    shilling ugali
Morocco   Rabat     Africa  Arabic     dirham   couscous
Ghana     Accra     Africa  English    cedi     fufu
Brazil    Brasilia  America Portuguese real     feijoada
Canada    Ottawa    America English    dollar   poutine
Peru      Lima      America Spanish    sol      ceviche
Sweden    Stockholm Europe  Swedish    krona    meatballs
"""
FOODS = """
apple      apples       red    sweet  fruit     orchard pie
banana     bananas      yellow sweet  fruit     grove   smoothie
lemon      lemons       yellow sour   fruit     grove   juice
cherry     cherries     red    sweet  fruit     orchard jam
grape      grapes       purple sweet  fruit     vine    wine
peach      peaches      orange sweet  fruit     orchard cobbler
olive      olives       green  salty  fruit     grove   oil
coconut    coconuts     brown  mild   nut       palm    cream
walnut     walnuts      brown  bitter nut       orchard brownie
almond     almonds      beige  mild   nut       orchard marzipan
carrot     carrots      orange sweet  root      soil    cake
radish     radishes     pink   sharp  root      soil    salad
beet       beets        purple earthy root      soil    soup
potato     potatoes     beige  earthy tuber     field   chips
onion      onions       white  sharp  bulb      field   rings
tomato     tomatoes     red    tangy  berry     vine    ketchup
pumpkin    pumpkins     orange mild   squash    patch   pie
cucumber   cucumbers    green  fresh  squash    vine    pickle
pepper     peppers      green  sharp  berry     field   salsa
mushroom   mushrooms    brown  earthy fungus    log     sauce
"""
TOOLS = """
hammer      hammers      pound   carpenter  nail     workshop
saw         saws         cut     lumberjack wood     mill
needle      needles      sew     tailor     cloth    basket
broom       brooms       sweep   janitor    floor    closet
spoon       spoons       stir    cook       stew     kitchen
brush       brushes      paint   artist     canvas   studio
shovel      shovels      dig     gardener   earth    shed
axe         axes         chop    woodsman   trunk    cabin
pen         pens         write   author     paper    desk
knife       knives       slice   butcher    meat     counter
ladder      ladders      climb   roofer     wall     garage
wrench      wrenches     tighten plumber    pipe     van
drill       drills       bore    builder    concrete site
rake        rakes        gather  groundsman foliage  park
camera      cameras      shoot   reporter   scene    bag
telescope   telescopes   observe astronomer star     tower
anvil       anvils       shape   smith      iron     forge
net         nets         catch   fisher     salmon   boat
loom        looms        weave   weaver     yarn     attic
plough      ploughs      till    farmer     acre     barnyard
"""

# Ways to ask for each attribute: phrases that follow "give", and questions.
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


def _table(text: str) -> list[list[str]]:
    return [line.split() for line in text.strip().splitlines()]


def _column(rows: list[list[str]], index: int) -> dict[str, str]:
    return {row[0]: row[index] for row in rows}


_ANIMALS, _COUNTRIES, _FOODS, _TOOLS = map(_table, (ANIMALS, COUNTRIES, FOODS, TOOLS))
_KINDS = {"animal": _ANIMALS, "country": _COUNTRIES, "food": _FOODS, "tool": _TOOLS}
THINGS = tuple(row[0] for table in _KINDS.values() for row in table)
# The columns of each table by name; the first is the thing itself.
_COLUMNS = (
    (_ANIMALS, ("plural", "young", "sound", "home", "group", "class", "covering", "diet")),
    (_COUNTRIES, ("capital", "continent", "language", "currency", "dish")),
    (_FOODS, ("plural", "colour", "taste", "type", "origin", "recipe")),
    (_TOOLS, ("plural", "use", "worker", "target", "storage")),
)


def _values() -> dict[str, dict[str, str]]:
    """What each attribute says of which things."""
    values: dict[str, dict[str, str]] = {}
    for table, names in _COLUMNS:
        for index, name in enumerate(names, start=1):
            values.setdefault(name, {}).update(_column(table, index))
    values["kind"] = {row[0]: kind for kind, table in _KINDS.items() for row in table}
    values["initial"] = {thing: thing[0].upper() for thing in THINGS}
    return values


def _attributes() -> tuple[Attribute, ...]:
    values, found = _values(), []
    for block in re.split(r"\n(?=\S)", ASKED.strip()):
        name, *lines = block.splitlines()
        asked = [part.strip() for part in " ".join(line.strip() for line in lines).split(";") if part.strip()]
        questions = tuple(part for part in asked if part.endswith("?"))
        found.append(Attribute(name, values[name], tuple(part for part in asked if part not in questions), questions))
    return tuple(found)


ATTRIBUTES = _attributes()
