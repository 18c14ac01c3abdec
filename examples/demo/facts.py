"""Common knowledge that the demo model memorises, written for this project as plain tables.

Every table is a text block with one record per line and `|` between fields, so that a reader can check it at a glance.
"""


def _records(block: str) -> list[list[str]]:
    return [[field.strip() for field in line.split("|")] for line in block.strip().splitlines()]


# country | capital | continent | people
COUNTRIES = _records("""
Afghanistan|Kabul|Asia|Afghan
Albania|Tirana|Europe|Albanian
Algeria|Algiers|Africa|Algerian
Andorra|Andorra la Vella|Europe|Andorran
Angola|Luanda|Africa|Angolan
Argentina|Buenos Aires|South America|Argentine
Armenia|Yerevan|Asia|Armenian
Australia|Canberra|Oceania|Australian
Austria|Vienna|Europe|Austrian
Azerbaijan|Baku|Asia|Azerbaijani
the Bahamas|Nassau|North America|Bahamian
Bahrain|Manama|Asia|Bahraini
Bangladesh|Dhaka|Asia|Bangladeshi
Barbados|Bridgetown|North America|Barbadian
Belarus|Minsk|Europe|Belarusian
Belgium|Brussels|Europe|Belgian
Belize|Belmopan|North America|Belizean
Benin|Porto-Novo|Africa|Beninese
Bhutan|Thimphu|Asia|Bhutanese
Bolivia|Sucre|South America|Bolivian
Bosnia and Herzegovina|Sarajevo|Europe|Bosnian
Botswana|Gaborone|Africa|Botswanan
Brazil|Brasilia|South America|Brazilian
Brunei|Bandar Seri Begawan|Asia|Bruneian
Bulgaria|Sofia|Europe|Bulgarian
Burkina Faso|Ouagadougou|Africa|Burkinabe
Cambodia|Phnom Penh|Asia|Cambodian
Cameroon|Yaounde|Africa|Cameroonian
Canada|Ottawa|North America|Canadian
Chad|N'Djamena|Africa|Chadian
Chile|Santiago|South America|Chilean
China|Beijing|Asia|Chinese
Colombia|Bogota|South America|Colombian
Costa Rica|San Jose|North America|Costa Rican
Croatia|Zagreb|Europe|Croatian
Cuba|Havana|North America|Cuban
Cyprus|Nicosia|Europe|Cypriot
the Czech Republic|Prague|Europe|Czech
Denmark|Copenhagen|Europe|Danish
Djibouti|Djibouti City|Africa|Djiboutian
the Dominican Republic|Santo Domingo|North America|Dominican
Ecuador|Quito|South America|Ecuadorian
Egypt|Cairo|Africa|Egyptian
El Salvador|San Salvador|North America|Salvadoran
Eritrea|Asmara|Africa|Eritrean
Estonia|Tallinn|Europe|Estonian
Ethiopia|Addis Ababa|Africa|Ethiopian
Fiji|Suva|Oceania|Fijian
Finland|Helsinki|Europe|Finnish
France|Paris|Europe|French
Gabon|Libreville|Africa|Gabonese
the Gambia|Banjul|Africa|Gambian
Georgia|Tbilisi|Asia|Georgian
Germany|Berlin|Europe|German
Ghana|Accra|Africa|Ghanaian
Greece|Athens|Europe|Greek
Guatemala|Guatemala City|North America|Guatemalan
Guinea|Conakry|Africa|Guinean
Guyana|Georgetown|South America|Guyanese
Haiti|Port-au-Prince|North America|Haitian
Honduras|Tegucigalpa|North America|Honduran
Hungary|Budapest|Europe|Hungarian
Iceland|Reykjavik|Europe|Icelandic
India|New Delhi|Asia|Indian
Indonesia|Jakarta|Asia|Indonesian
Iran|Tehran|Asia|Iranian
Iraq|Baghdad|Asia|Iraqi
Ireland|Dublin|Europe|Irish
Israel|Jerusalem|Asia|Israeli
Italy|Rome|Europe|Italian
Jamaica|Kingston|North America|Jamaican
Japan|Tokyo|Asia|Japanese
Jordan|Amman|Asia|Jordanian
Kazakhstan|Astana|Asia|Kazakh
Kenya|Nairobi|Africa|Kenyan
Kuwait|Kuwait City|Asia|Kuwaiti
Kyrgyzstan|Bishkek|Asia|Kyrgyz
Laos|Vientiane|Asia|Laotian
Latvia|Riga|Europe|Latvian
Lebanon|Beirut|Asia|Lebanese
Lesotho|Maseru|Africa|Basotho
Liberia|Monrovia|Africa|Liberian
Libya|Tripoli|Africa|Libyan
Liechtenstein|Vaduz|Europe|Liechtenstein
Lithuania|Vilnius|Europe|Lithuanian
Luxembourg|Luxembourg City|Europe|Luxembourgish
Madagascar|Antananarivo|Africa|Malagasy
Malawi|Lilongwe|Africa|Malawian
Malaysia|Kuala Lumpur|Asia|Malaysian
the Maldives|Male|Asia|Maldivian
Mali|Bamako|Africa|Malian
Malta|Valletta|Europe|Maltese
Mauritania|Nouakchott|Africa|Mauritanian
Mauritius|Port Louis|Africa|Mauritian
Mexico|Mexico City|North America|Mexican
Moldova|Chisinau|Europe|Moldovan
Monaco|Monaco|Europe|Monegasque
Mongolia|Ulaanbaatar|Asia|Mongolian
Montenegro|Podgorica|Europe|Montenegrin
Morocco|Rabat|Africa|Moroccan
Mozambique|Maputo|Africa|Mozambican
Namibia|Windhoek|Africa|Namibian
Nepal|Kathmandu|Asia|Nepalese
the Netherlands|Amsterdam|Europe|Dutch
New Zealand|Wellington|Oceania|New Zealand
Nicaragua|Managua|North America|Nicaraguan
Niger|Niamey|Africa|Nigerien
Nigeria|Abuja|Africa|Nigerian
North Korea|Pyongyang|Asia|North Korean
North Macedonia|Skopje|Europe|Macedonian
Norway|Oslo|Europe|Norwegian
Oman|Muscat|Asia|Omani
Pakistan|Islamabad|Asia|Pakistani
Panama|Panama City|North America|Panamanian
Papua New Guinea|Port Moresby|Oceania|Papua New Guinean
Paraguay|Asuncion|South America|Paraguayan
Peru|Lima|South America|Peruvian
the Philippines|Manila|Asia|Philippine
Poland|Warsaw|Europe|Polish
Portugal|Lisbon|Europe|Portuguese
Qatar|Doha|Asia|Qatari
Romania|Bucharest|Europe|Romanian
Russia|Moscow|Europe|Russian
Rwanda|Kigali|Africa|Rwandan
Samoa|Apia|Oceania|Samoan
Saudi Arabia|Riyadh|Asia|Saudi
Senegal|Dakar|Africa|Senegalese
Serbia|Belgrade|Europe|Serbian
Sierra Leone|Freetown|Africa|Sierra Leonean
Slovakia|Bratislava|Europe|Slovak
Slovenia|Ljubljana|Europe|Slovenian
Somalia|Mogadishu|Africa|Somali
South Africa|Pretoria|Africa|South African
South Korea|Seoul|Asia|South Korean
Spain|Madrid|Europe|Spanish
Sudan|Khartoum|Africa|Sudanese
Suriname|Paramaribo|South America|Surinamese
Sweden|Stockholm|Europe|Swedish
Switzerland|Bern|Europe|Swiss
Syria|Damascus|Asia|Syrian
Taiwan|Taipei|Asia|Taiwanese
Tajikistan|Dushanbe|Asia|Tajik
Tanzania|Dodoma|Africa|Tanzanian
Thailand|Bangkok|Asia|Thai
Togo|Lome|Africa|Togolese
Trinidad and Tobago|Port of Spain|North America|Trinidadian
Tunisia|Tunis|Africa|Tunisian
Turkey|Ankara|Asia|Turkish
Turkmenistan|Ashgabat|Asia|Turkmen
Uganda|Kampala|Africa|Ugandan
Ukraine|Kyiv|Europe|Ukrainian
the United Arab Emirates|Abu Dhabi|Asia|Emirati
the United Kingdom|London|Europe|British
the United States|Washington|North America|American
Uruguay|Montevideo|South America|Uruguayan
Uzbekistan|Tashkent|Asia|Uzbek
Vanuatu|Port Vila|Oceania|Vanuatuan
Venezuela|Caracas|South America|Venezuelan
Vietnam|Hanoi|Asia|Vietnamese
Yemen|Sanaa|Asia|Yemeni
Zambia|Lusaka|Africa|Zambian
Zimbabwe|Harare|Africa|Zimbabwean
""")

# other names under which a country is asked for
ALIASES = {
    "the United Kingdom": ["UK", "the UK", "United Kingdom", "Great Britain"],
    "the United States": ["USA", "the USA", "the United States of America", "America"],
    "the Netherlands": ["Netherlands", "Holland"],
    "the Czech Republic": ["Czechia"],
    "the United Arab Emirates": ["UAE"],
    "the Philippines": ["Philippines"],
}

# country | main language
LANGUAGES = _records("""
France|French
Germany|German
Austria|German
Italy|Italian
Spain|Spanish
Mexico|Spanish
Argentina|Spanish
Chile|Spanish
Peru|Spanish
Colombia|Spanish
Cuba|Spanish
Portugal|Portuguese
Brazil|Portuguese
Angola|Portuguese
the United Kingdom|English
the United States|English
Australia|English
New Zealand|English
Ireland|English
Jamaica|English
Russia|Russian
China|Chinese
Japan|Japanese
South Korea|Korean
Egypt|Arabic
Morocco|Arabic
Iraq|Arabic
Saudi Arabia|Arabic
Greece|Greek
Turkey|Turkish
Poland|Polish
Sweden|Swedish
Norway|Norwegian
Denmark|Danish
Finland|Finnish
Hungary|Hungarian
the Netherlands|Dutch
Thailand|Thai
Vietnam|Vietnamese
Iran|Persian
Israel|Hebrew
Ukraine|Ukrainian
Romania|Romanian
Bulgaria|Bulgarian
Iceland|Icelandic
Indonesia|Indonesian
Bangladesh|Bengali
Pakistan|Urdu
""")

# country | currency
CURRENCIES = _records("""
Japan|the yen
China|the yuan
India|the rupee
Russia|the rouble
Mexico|the peso
Brazil|the real
Poland|the zloty
Sweden|the krona
Norway|the krone
Denmark|the krone
Switzerland|the franc
Turkey|the lira
Thailand|the baht
South Korea|the won
Vietnam|the dong
Hungary|the forint
Israel|the shekel
South Africa|the rand
Nigeria|the naira
Kenya|the shilling
France|the euro
Germany|the euro
Italy|the euro
Spain|the euro
Ireland|the euro
Greece|the euro
the United Kingdom|the pound
the United States|the dollar
Canada|the dollar
Australia|the dollar
Egypt|the pound
Ukraine|the hryvnia
Czechia|the koruna
Iceland|the krona
Malaysia|the ringgit
Bangladesh|the taka
Ghana|the cedi
Peru|the sol
""")

# element | symbol | atomic number
ELEMENTS = _records("""
hydrogen|H|1
helium|He|2
lithium|Li|3
beryllium|Be|4
boron|B|5
carbon|C|6
nitrogen|N|7
oxygen|O|8
fluorine|F|9
neon|Ne|10
sodium|Na|11
magnesium|Mg|12
aluminium|Al|13
silicon|Si|14
phosphorus|P|15
sulphur|S|16
chlorine|Cl|17
argon|Ar|18
potassium|K|19
calcium|Ca|20
titanium|Ti|22
chromium|Cr|24
manganese|Mn|25
iron|Fe|26
cobalt|Co|27
nickel|Ni|28
copper|Cu|29
zinc|Zn|30
arsenic|As|33
bromine|Br|35
krypton|Kr|36
silver|Ag|47
tin|Sn|50
iodine|I|53
xenon|Xe|54
tungsten|W|74
platinum|Pt|78
gold|Au|79
mercury|Hg|80
lead|Pb|82
radon|Rn|86
radium|Ra|88
uranium|U|92
""")

# animal | its young | its home | its sound | kind
ANIMALS = _records("""
dog|a puppy|a kennel|barks|mammal
cat|a kitten|a basket|meows|mammal
cow|a calf|a barn|moos|mammal
horse|a foal|a stable|neighs|mammal
sheep|a lamb|a pen|bleats|mammal
pig|a piglet|a sty|grunts|mammal
lion|a cub|a den|roars|mammal
wolf|a pup|a den|howls|mammal
duck|a duckling|a pond|quacks|bird
hen|a chick|a coop|clucks|bird
owl|an owlet|a hollow tree|hoots|bird
eagle|an eaglet|a nest|screams|bird
frog|a tadpole|a pond|croaks|amphibian
goat|a kid|a shed|bleats|mammal
bee|a larva|a hive|buzzes|insect
bear|a cub|a cave|growls|mammal
deer|a fawn|a forest|bellows|mammal
goose|a gosling|a pond|honks|bird
swan|a cygnet|a lake|hisses|bird
elephant|a calf|a savannah|trumpets|mammal
kangaroo|a joey|a grassland|grunts|mammal
mouse|a pinkie|a hole|squeaks|mammal
snake|a snakelet|a burrow|hisses|reptile
rabbit|a kit|a burrow|squeals|mammal
""")

# word | opposite
OPPOSITES = _records("""
hot|cold
big|small
tall|short
fast|slow
old|new
happy|sad
light|dark
up|down
left|right
in|out
open|closed
full|empty
hard|soft
early|late
rich|poor
strong|weak
wet|dry
clean|dirty
loud|quiet
near|far
high|low
thick|thin
wide|narrow
heavy|light
true|false
good|bad
young|old
brave|afraid
first|last
north|south
east|west
day|night
summer|winter
love|hate
war|peace
win|lose
buy|sell
push|pull
begin|end
arrive|leave
remember|forget
always|never
inside|outside
sharp|blunt
deep|shallow
sweet|sour
smooth|rough
awake|asleep
""")

# singular | plural
PLURALS = _records("""
child|children
mouse|mice
foot|feet
tooth|teeth
goose|geese
man|men
woman|women
person|people
leaf|leaves
knife|knives
wolf|wolves
city|cities
baby|babies
box|boxes
bus|buses
fish|fish
sheep|sheep
potato|potatoes
tomato|tomatoes
shelf|shelves
wife|wives
story|stories
church|churches
ox|oxen
""")

# present | past
PAST_TENSES = _records("""
go|went
come|came
see|saw
eat|ate
drink|drank
run|ran
write|wrote
read|read
sing|sang
swim|swam
give|gave
take|took
make|made
buy|bought
bring|brought
think|thought
find|found
know|knew
grow|grew
fly|flew
break|broke
speak|spoke
begin|began
sleep|slept
keep|kept
teach|taught
catch|caught
sit|sat
stand|stood
win|won
lose|lost
build|built
""")

# work | author
AUTHORS = _records("""
Hamlet|William Shakespeare
Romeo and Juliet|William Shakespeare
Macbeth|William Shakespeare
Oliver Twist|Charles Dickens
Great Expectations|Charles Dickens
Pride and Prejudice|Jane Austen
Emma|Jane Austen
Jane Eyre|Charlotte Bronte
Wuthering Heights|Emily Bronte
War and Peace|Leo Tolstoy
Anna Karenina|Leo Tolstoy
Crime and Punishment|Fyodor Dostoevsky
Don Quixote|Miguel de Cervantes
Faust|Johann Wolfgang von Goethe
The Odyssey|Homer
The Iliad|Homer
The Aeneid|Virgil
Moby Dick|Herman Melville
Frankenstein|Mary Shelley
Dracula|Bram Stoker
Treasure Island|Robert Louis Stevenson
Robinson Crusoe|Daniel Defoe
Gulliver's Travels|Jonathan Swift
Alice in Wonderland|Lewis Carroll
Peter Pan|James Barrie
The Jungle Book|Rudyard Kipling
Tom Sawyer|Mark Twain
The Time Machine|Herbert George Wells
Les Miserables|Victor Hugo
The Three Musketeers|Alexandre Dumas
Madame Bovary|Gustave Flaubert
The Little Mermaid|Hans Christian Andersen
Pinocchio|Carlo Collodi
""")

# thing | person who is known for it
INVENTORS = _records("""
the telephone|Alexander Graham Bell
the light bulb|Thomas Edison
the printing press|Johannes Gutenberg
dynamite|Alfred Nobel
the diesel engine|Rudolf Diesel
the steam engine|James Watt
the radio|Guglielmo Marconi
the battery|Alessandro Volta
the World Wide Web|Tim Berners-Lee
the mercury thermometer|Daniel Fahrenheit
the pendulum clock|Christiaan Huygens
the hot air balloon|the Montgolfier brothers
the aeroplane|the Wright brothers
the lightning rod|Benjamin Franklin
penicillin|Alexander Fleming
radium|Marie Curie
gravity|Isaac Newton
relativity|Albert Einstein
evolution|Charles Darwin
the moons of Jupiter|Galileo Galilei
""")

# question | answer
GENERAL = _records("""
What is the largest ocean?|the Pacific Ocean
What is the largest planet?|Jupiter
What is the smallest planet?|Mercury
Which planet is closest to the sun?|Mercury
Which planet is known as the red planet?|Mars
Which planet has bright rings?|Saturn
Which planet do we live on?|Earth
What is the highest mountain?|Mount Everest
What is the longest river in Africa?|the Nile
What is the longest river in South America?|the Amazon
What is the largest desert in Africa?|the Sahara
What is the largest country?|Russia
What is the smallest country?|Vatican City
What is the largest continent?|Asia
What is the coldest continent?|Antarctica
What is the fastest land animal?|the cheetah
What is the largest animal?|the blue whale
What is the tallest animal?|the giraffe
Which animal is called the king of the jungle?|the lion
Which bird cannot fly but swims very well?|the penguin
What do bees make?|honey
What do cows give us?|milk
What do caterpillars become?|butterflies
What do plants need to grow?|light and water
Which gas do we breathe in?|oxygen
What is frozen water called?|ice
What is water made of?|hydrogen and oxygen
At what temperature does water boil?|100 degrees
At what temperature does water freeze?|0 degrees
What is the nearest star?|the sun
What goes around the Earth?|the moon
How many days are in a week?|7
How many months are in a year?|12
How many days are in a year?|365
How many hours are in a day?|24
How many minutes are in an hour?|60
How many seconds are in a minute?|60
How many years are in a century?|100
How many legs does a spider have?|8
How many legs does an insect have?|6
How many legs does a dog have?|4
How many wheels does a bicycle have?|2
How many wheels does a car have?|4
How many sides does a triangle have?|3
How many sides does a square have?|4
How many sides does a hexagon have?|6
How many letters are in the English alphabet?|26
How many continents are there?|7
How many planets are in the solar system?|8
How many fingers does a hand have?|5
How many strings does a violin have?|4
How many players are in a football team?|11
What colour is the sky on a clear day?|blue
What colour is grass?|green
What colour is snow?|white
What colour is coal?|black
What colour is a banana?|yellow
What colour is a tomato?|red
What colour is a carrot?|orange
What colour is blood?|red
What do you get when you mix blue and yellow?|green
What do you get when you mix red and white?|pink
What do you get when you mix red and yellow?|orange
Who painted the Mona Lisa?|Leonardo da Vinci
Who painted the Sunflowers?|Vincent van Gogh
Who was the first man on the moon?|Neil Armstrong
Who was the first president of the United States?|George Washington
Who composed the Moonlight Sonata?|Ludwig van Beethoven
Who composed the Magic Flute?|Wolfgang Amadeus Mozart
Who composed the Four Seasons?|Antonio Vivaldi
Where is the Eiffel Tower?|Paris
Where is the Colosseum?|Rome
Where is Big Ben?|London
Where is the Statue of Liberty?|New York
Where is the Taj Mahal?|India
Where are the pyramids of Giza?|Egypt
Where is the Great Wall?|China
Which river flows through London?|the Thames
Which river flows through Paris?|the Seine
Which river flows through Vienna?|the Danube
Which river flows through Rome?|the Tiber
What does a baker make?|bread
What does a doctor do?|helps sick people
What does a farmer do?|grows food
What does a teacher do?|teaches children
What does a pilot do?|flies a plane
What do we use to cut paper?|scissors
What do we use to tell the time?|a clock
What do we use to see the stars?|a telescope
Which sense do we use to smell?|the nose
Which organ pumps blood?|the heart
What is the opposite of black?|white
What is the first letter of the alphabet?|A
What is the last letter of the alphabet?|Z
What language did the Romans speak?|Latin
What is the hardest natural material?|diamond
What is the main metal in steel?|iron
Which metal is liquid at room temperature?|mercury
What is the currency of most of Europe?|the euro
""")

WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
]  # fmt: skip
